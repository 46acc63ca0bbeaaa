"""A trace file is what was recorded, is mapped and not read, and a damaged one is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.routing.choices import Routing
from haq_lab.routing.record import record_trace
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import UserError


def test_round_trip_is_memory_mapped(make_trace, tmp_path):
    trace = make_trace(prompt=10)
    trace.save(tmp_path / "a.trace")
    read = Trace.open(tmp_path / "a.trace")
    for name in ("experts", "weights", "decode", "starts"):
        assert isinstance(getattr(read, name), np.memmap)
        np.testing.assert_array_equal(getattr(read, name), getattr(trace, name))
    assert (read.model, read.text, read.expert_count) == ("made", "up", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["a.trace"]


def test_part_keeps_the_sequences_apart(make_trace):
    trace = make_trace(tokens=300, sequences=3)
    part = trace.part(slice(1, 3))
    np.testing.assert_array_equal(part.experts, trace.experts[100:])
    assert part.starts.tolist() == [0, 100]


def test_what_calibration_writes_can_be_read(tmp_path):
    routing = Routing(experts=4, windows=(2, 3))
    chosen = torch.randint(0, 4, (6, 2))
    routing.add_layer(chosen, torch.rand(6, 2))
    routing.trace("model", "text").save(tmp_path / "r.trace")
    trace = Trace.open(tmp_path / "r.trace")
    np.testing.assert_array_equal(trace.experts[:, 0], chosen.numpy())
    assert not trace.decode.any()
    assert trace.starts.tolist() == [0, 3]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_damaged_files_are_refused(make_trace, tmp_path, keep):
    make_trace().save(tmp_path / "a.trace")
    data = (tmp_path / "a.trace").read_bytes()
    (tmp_path / "b.trace").write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"b\.trace"):
        Trace.open(tmp_path / "b.trace")
    with pytest.raises(UserError, match="no file"):
        Trace.open(tmp_path / "c.trace")


def test_recorded_choices_are_the_routers(windows):
    model = LayeredModel(TinyModel("mixtral").folder())
    trace = record_trace(model, windows, "random", prompt=8)
    hidden = model.embed(windows)
    for index in range(model.depth):
        layer = model.load_layer(index)
        inputs = []
        layer.get_submodule("mlp.gate").register_forward_pre_hook(
            lambda module, args, seen=inputs: seen.append(args[0])
        )
        model.run(layer, index, hidden)
        x = torch.cat(inputs).reshape(-1, hidden.shape[-1])
        expected = (x @ layer.get_submodule("mlp.gate").weight.t()).topk(2).indices
        np.testing.assert_array_equal(trace.experts[:, index], expected.numpy())
    assert trace.decode.reshape(5, 48).sum(1).tolist() == [40] * 5


def test_a_dense_model_has_no_trace(windows):
    with pytest.raises(UserError, match="no experts"):
        record_trace(LayeredModel(TinyModel("llama").folder()), windows, "random")
