"""On a machine with an NVIDIA GPU: every kernel, bit-exact, through CuPy on torch's memory. `pytest -m gpu`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from haq_lab.int8 import cuda
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cuda import Kernels
from haq_lab.int8.cuda_backend import CudaBackend
from haq_lab.int8.launch import TILES
from haq_lab.models.layered import LayeredModel
from haq_lab.models.sources import TinyModel

from .checks import FLOATS, Draw, check_grouped, check_product, check_quantize, every_kernel
from .test_cuda_backend import logits_of

READY = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not READY, reason="needs an NVIDIA GPU that torch can use, and CuPy"),
]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return cuda.kernels()


@pytest.mark.parametrize("name", every_kernel())
def test_every_kernel(kernels: Kernels, name: str):
    every_kernel()[name](kernels, "cuda")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("split", [1, 5])
def test_products_of_real_size(kernels: Kernels, tile, split, dtype):
    for m, n, k in ((1, 576, 1536), (511, 1027, 4096), (300, 4096, 14336)):
        check_product(kernels, m, n, k, dtype, bias=True, seed=2, tile=tile, split=split, device="cuda")


def test_experts_of_real_size(kernels: Kernels):
    check_grouped(
        kernels,
        [0, 700, 3, 129, 64, 0, 1, 500],
        2048,
        1024,
        torch.bfloat16,
        bias=False,
        seed=3,
        device="cuda",
    )


@pytest.mark.parametrize("kind", ["plain", "rmsnorm", "layernorm", "swiglu"])
def test_rows_longer_than_shared_memory(kernels: Kernels, kind: str):
    check_quantize(kernels, kind, 7, 65536, torch.float16, static=False, seed=4, device="cuda")


def test_calls_follow_torchs_current_stream(kernels: Kernels):
    """The input is written on a side stream just before the call: another stream would read it too early."""
    draw = Draw(5, "cuda")
    x, qw = draw.normal(4096, 4096), draw.int8(64, 4096)
    expected = kernels.accumulate(kernels.quantize_rows(x * 3)[0], qw)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        target = torch.zeros_like(x)
        for _ in range(50):
            target.add_(x).sub_(x)
        target.copy_(x * 3)
        actual = kernels.accumulate(kernels.quantize_rows(target)[0], qw)
    torch.cuda.synchronize()
    assert torch.equal(actual, expected)


def test_a_run_comes_near_the_reference():
    """Norms and attention are torch's on the GPU, whose sums differ; the products' bits are checked above."""
    model = LayeredModel(TinyModel("llama").folder())
    prompt = torch.randint(0, 257, (1, 40))
    wanted = logits_of(model, ReferenceBackend(), prompt)
    before = torch.cuda.max_memory_allocated()
    got = logits_of(model, CudaBackend(), prompt)  # moves the model's own weights, hence last
    assert torch.cuda.max_memory_allocated() > before
    for ours, reference in zip(got, wanted, strict=True):
        assert (ours.cpu() - reference).norm() / reference.norm() < 0.05
