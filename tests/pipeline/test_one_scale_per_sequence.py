"""With `activations=tensor`, a model gives a sequence the same result alone and in a batch, whatever runs the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from alone_and_batched import decode, largest_change, sequences
from torch import Tensor
from two_tiers import TwoTiers, finished

from haq_lab.calibration.statistics import CalibrationPolicy, Needs
from haq_lab.int8.backend import Backend, ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.models import layerwise
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import ExpertFileWriter
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.deploy import deploy

TENSOR = RTN(activations="tensor")
SAME = 1e-5  # relative error of float32 sums in another order

backends = pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=["reference", "cpu"])


@backends
def test_an_evaluation_window_has_the_same_bits_alone_and_in_a_batch(tiny: LayeredModel, backend: Backend):
    windows = sequences()

    def states(own: Tensor) -> Tensor:
        inputs = PassInputs(tiny, TENSOR, backend, evaluation={"text": own})
        return sequential_pass(inputs, lambda index, layer: None).hidden["text"]["quantized"]

    together = states(windows)
    assert torch.equal(together, torch.cat([states(window[None]) for window in windows]))
    other = windows.clone()
    other[1:] = other[1:].flip(1)
    assert torch.equal(states(other)[0], together[0])


@backends
def test_a_deployed_model_decodes_a_sequence_alone_as_in_a_batch(tiny: LayeredModel, backend: Backend):
    layers = finished(tiny, quantizer=TENSOR, backend=backend)
    assert largest_change(deploy(tiny.assemble(layers), tiny, backend)) < SAME


def test_padding_does_not_change_a_sequence(tiny: LayeredModel):
    layers = finished(tiny, quantizer=TENSOR)
    whole, tokens = deploy(tiny.assemble(layers), tiny, CpuBackend()), sequences()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    alone = decode(whole, tokens[:1, 4:])
    assert (decode(whole, tokens, mask)[:1, 4:] - alone).norm() < SAME * alone.norm()
    assert (decode(whole, tokens)[:1, 4:] - alone).norm() > 100 * SAME * alone.norm(), "the padding has other values"


@pytest.mark.parametrize("rule", ["none", "lru"])
def test_offloaded_experts_give_a_sequence_alone_the_result_of_the_batch(rule: str, tmp_path: Path):
    """An expert receives tokens of several sequences. It may be resident, fetched, or run in the slow tier."""
    model = LayeredModel(TinyModel("mixtral", layers=3).folder())
    resident = deploy(model.assemble(finished(model, quantizer=TENSOR)), model, CpuBackend())
    placed = TwoTiers(CpuBackend(), Streams(), steps=2, quantizer=TENSOR)
    in_memory = placed.engine(rule, prefetch="gate")
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        in_place = placed.engine(rule, writer=writer, decide=lambda present, missing: list(missing)[::2])
        for engine, whole in (in_memory, in_place):
            assert largest_change(resident, whole) < SAME
            engine.check()
            engine.close()


def test_calibration_statistics_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch):
    """The inputs of later linears, and the tokens that stand in for an expert's own, pass through int8 linears."""
    ranges: list[Tensor] = []

    class Recording(RTN):
        needs = Needs(inputs=True)

        def smoothing(self, group, family, weight, statistics, channels):
            ranges.append(statistics.channel_max)

    for tokens in (24, 96):  # one window in a batch, and all four
        monkeypatch.setattr(layerwise, "TOKENS_PER_BATCH", tokens)
        inputs = PassInputs(
            LayeredModel(TinyModel("mixtral").folder()),
            Recording(activations="tensor"),
            CpuBackend(),
            calibration=sequences(4, 24),
            policy=CalibrationPolicy(min_tokens=24),
        )
        sequential_pass(inputs, lambda index, layer: None)
    half = len(ranges) // 2
    assert half == 2 * len(inputs.model.groups_of(0))
    for one, other in zip(ranges[:half], ranges[half:], strict=True):
        assert torch.equal(one, other)
