"""On a GPU too, here the host layer, `activations=tensor` gives a sequence the same result alone and in a batch."""

from __future__ import annotations

import pytest
import torch
from alone_and_batched import largest_change
from two_tiers import SeparateMemoryStreams, TwoTiers, finished

from haq_lab.int8.backend import PackedExpert, PackedLinear, ReferenceBackend
from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.sequences import Sequences
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.deploy import deploy

from .checks import FLOATS, Draw
from .reference import assert_same_bits

TENSOR = RTN(activations="tensor")
SAME = 1e-5  # relative error of float32 sums in another order


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [64, 40])
def test_a_sequence_has_the_references_bits_and_those_that_it_has_alone(host: Kernels, k, dtype):
    draw, index = Draw(5), torch.tensor([0, 2, 0, 1, 2, 2, 2])
    x = draw.activations(7, k, dtype)
    weights = [(draw.int8(*shape), draw.scale(shape[0])) for shape in ((16, k), (16, k), (k, 16))]
    backend, reference = CudaBackend("cpu", host), ReferenceBackend()

    def run(backend, rows, sequences):
        gate, up, down = (PackedLinear(backend.pack(levels), scale) for levels, scale in weights)
        quantized = backend.quantize(rows, "tensor", None, sequences)
        expert = backend.expert(*quantized, PackedExpert(gate, up, down, "tensor"), sequences)
        return backend.linear(rows, gate, "tensor", None, sequences), expert

    together = run(backend, x, Sequences(index, 3))
    for got, expected in zip(together, run(reference, x, Sequences(index, 3)), strict=True):
        assert_same_bits(got, expected)
    for number in range(3):
        for got, expected in zip(together, run(backend, x[index == number], None), strict=True):
            assert_same_bits(got[index == number], expected)


@pytest.mark.parametrize("architecture", ["opt", "llama", "mixtral"])
def test_a_deployed_model_decodes_a_sequence_alone_as_in_a_batch(host: Kernels, architecture: str):
    model, backend = LayeredModel(TinyModel(architecture).folder()), CudaBackend("cpu", host)
    layers = finished(model, quantizer=TENSOR, backend=backend)
    assert largest_change(deploy(model.assemble(layers), model, backend)) < SAME


def test_experts_on_the_device_and_beside_it_give_a_sequence_alone_the_result_of_the_batch(host: Kernels):
    placed = TwoTiers(CudaBackend("cpu", host), SeparateMemoryStreams("cpu"), steps=2, quantizer=TENSOR)
    engine, whole = placed.engine(slots=4, decide=lambda present, missing: list(missing)[::2])
    assert largest_change(whole) < SAME
    engine.close()
