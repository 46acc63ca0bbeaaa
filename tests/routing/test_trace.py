"""A trace file holds what was recorded and is memory-mapped. A damaged file is refused with one line."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    routing = Routing(experts=4, layers=(0, 1), windows=(2, 3))
    chosen = torch.randint(0, 4, (6, 2))
    routing.add_layer(chosen, torch.tensor([[0.75, 0.25]] * 6))
    routing.trace("model", "text").save(tmp_path / "r.trace")
    trace = Trace.open(tmp_path / "r.trace")
    np.testing.assert_array_equal(trace.experts[:, 0], chosen.numpy())
    assert not trace.decode.any()
    assert trace.starts.tolist() == [0, 3]


def trace_of(experts, count) -> Trace:
    """One sequence of decoded tokens with the given choices (tokens, layers, k)."""
    weights = np.full(experts.shape, 0.5, np.float16)
    return Trace(experts, weights, np.ones(len(experts), bool), np.zeros(1, np.int64), count)


@pytest.mark.parametrize(("count", "dtype"), [(256, np.uint8), (257, np.uint16), (384, np.uint16), (65536, np.uint16)])
def test_more_than_256_experts_a_layer(tmp_path, count, dtype):
    experts = np.random.default_rng(0).integers(0, count, (50, 2, 8))
    experts[0, 0, 0] = count - 1
    trace_of(experts, count).save(tmp_path / "a.trace")
    read = Trace.open(tmp_path / "a.trace")
    assert read.experts.dtype == dtype
    assert read.expert_count == count
    np.testing.assert_array_equal(read.experts, experts)


def test_calibration_and_statistics_take_300_experts():
    chosen = torch.tensor([[299, 0], [299, 1], [44, 0]])
    routing = Routing(experts=300, layers=(0,), windows=(1, 3))
    routing.add_layer(chosen, torch.full((3, 2), 0.5))
    assert routing.counts(0).nonzero().flatten().tolist() == [0, 1, 44, 299]
    table = routing.table()
    assert table[table.tokens == 2].expert.tolist() == [0, 299]
    np.testing.assert_array_equal(routing.trace("model", "text").experts[:, 0], chosen.numpy())


def refusal_of(path) -> str:
    """The message for a file that is not a trace: one line with the file, the reason and the remedy."""
    with pytest.raises(UserError) as refused:
        Trace.open(path)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    assert message.startswith(f"trace: '{path}' is damaged or is not a routing trace (")
    assert message.endswith("). Record it again with python -m haq_lab.offload trace.")
    return message


def with_header(data: bytes, header: bytes) -> bytes:
    """A trace file with another header."""
    (length,) = struct.unpack("<Q", data[:8])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def header_of(data: bytes) -> dict:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


@pytest.fixture(scope="module")
def stored(make_trace, tmp_path_factory) -> bytes:
    """The bytes of a trace file."""
    path = tmp_path_factory.mktemp("stored") / "a.trace"
    make_trace(tokens=40).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_files_are_refused(stored, tmp_path, kept):
    (tmp_path / "b.trace").write_bytes(stored[:kept])
    refusal_of(tmp_path / "b.trace")


def test_a_missing_file_is_refused(stored, tmp_path):
    (tmp_path / "made.trace").write_bytes(stored)
    with pytest.raises(UserError, match=r"there is no file '.*mad\.trace' \(did you mean 'made\.trace'\?\)"):
        Trace.open(tmp_path / "mad.trace")


DEEP = b'{"a":' * 100_000
HEADERS = {
    "nested too deeply": (DEEP, "recursion"),
    "nested too deeply, and closed": (DEEP + b"1" + b"}" * 100_000, "recursion"),
    "a number that is too long": (b'{"experts":' + b"9" * 10_000 + b"}", "number out of range"),
    "a list": (b"[1, 2]", ""),
    "a text": (b'"experts"', ""),
    "no UTF-8": (b'{"\xff": 1}', "unicode"),
    "empty": (b"{}", "do not fill the file"),
    "too large": (b"{" + b" " * 2**20 + b"}", "its header has more than"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_no_tensors_are_refused(stored, tmp_path, name):
    header, reason = HEADERS[name]
    (tmp_path / "b.trace").write_bytes(with_header(stored, header))
    assert reason in refusal_of(tmp_path / "b.trace")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("experts", {"shape": [-40, -4, 2]}),
        ("experts", {"shape": [40, 4.0, 2]}),
        ("experts", {"shape": [10**30, 1, 1], "data_offsets": [0, 10**30]}),
        ("experts", {"shape": [0, 4, 2], "data_offsets": [0, 0]}),
        ("experts", {"shape": [8], "data_offsets": [0, 8]}),
        ("experts", {"shape": [1e999, 4, 2]}),
        ("experts", {"data_offsets": [0]}),
        ("experts", {"data_offsets": [-320, 0]}),
        ("experts", {"data_offsets": {"0": 1}}),
        ("experts", {"dtype": "F16"}),
        ("experts", {"dtype": "F4"}),
        ("experts", {"dtype": ["U8"]}),
        ("starts", {"shape": [2, 1]}),
        ("weights", {"shape": [4, 40, 2]}),
        ("decode", None),
        ("__metadata__", None),
        ("__metadata__", [1]),
        ("__metadata__", {"experts": "many"}),
        ("__metadata__", {"experts": "1"}),
        ("__metadata__", {"experts": "100000"}),
        ("__metadata__", {"experts": None}),
    ],
)
def test_wrong_entries_are_refused(stored, tmp_path, name, entry):
    header = header_of(stored)
    header[name] = header[name] | entry if isinstance(entry, dict) and name != "__metadata__" else entry
    (tmp_path / "b.trace").write_bytes(with_header(stored, json.dumps(header).encode()))
    refusal_of(tmp_path / "b.trace")


@pytest.mark.parametrize("starts", [[0, 2**63 - 1, -(2**63)], [0, 5, 5], [1, 5], [0, 40], [0, -1]])
def test_starts_that_do_not_ascend_within_the_tokens_are_refused(make_trace, starts):
    """Compiled code does not check bounds. Differences of the first case overflow to a positive number."""
    trace = make_trace(tokens=40)
    with pytest.raises(ValueError, match="start"):
        Trace(trace.experts, trace.weights, trace.decode, np.array(starts), trace.expert_count)


def test_a_byte_that_is_no_truth_value_is_refused(stored, tmp_path):
    header, data = header_of(stored), bytearray(stored)
    first, last = header["decode"]["data_offsets"]
    data[len(data) - (max(entry["data_offsets"][1] for entry in tensors(header)) - first)] = 2
    (tmp_path / "b.trace").write_bytes(data)
    assert "decode" in refusal_of(tmp_path / "b.trace")
    assert last > first


def tensors(header: dict) -> list[dict]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


def open_or_refuse(path) -> None:
    """Open a file that may be damaged. It is a valid trace, or the refusal is one line."""
    try:
        trace = Trace.open(path)
    except UserError:
        refusal_of(path)
    else:
        assert trace.experts.max() < trace.expert_count
        assert trace.decode.shape == (trace.tokens,)
        assert (trace.ends() > trace.starts).all()
        assert trace.ends()[-1] == trace.tokens


@given(data=st.data())
def test_fuzzed_headers(stored, tmp_path_factory, data):
    """Any part of the header may have any JSON value."""
    path, header = tmp_path_factory.getbasetemp() / "fuzzed.trace", header_of(stored)
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name][data.draw(st.sampled_from(sorted(header[name])))] = data.draw(JSON)
    else:
        header[name] = data.draw(JSON)
    path.write_bytes(with_header(stored, json.dumps(header).encode()))
    open_or_refuse(path)


@given(at=st.integers(0, 2000), garbage=st.binary(min_size=1, max_size=20), end=st.integers(0, 4000))
def test_fuzzed_bytes(stored, tmp_path_factory, at, garbage, end):
    """Bytes are overwritten, and the file is cut."""
    path, data = tmp_path_factory.getbasetemp() / "fuzzed.trace", bytearray(stored)
    data[at : at + len(garbage)] = garbage
    path.write_bytes(data[:end])
    open_or_refuse(path)


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
    with pytest.raises(UserError, match="a 'llama' has no experts"):
        record_trace(LayeredModel(TinyModel("llama").folder()), windows, "random")
