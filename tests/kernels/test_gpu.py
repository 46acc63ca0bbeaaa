"""On a machine with an NVIDIA GPU: every kernel, bit-exact, through CuPy on torch's memory. `pytest -m gpu`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cuda import device as cuda_device
from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import TILES
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.grouped_experts import GroupedExperts

from .checks import (
    FLOATS,
    FOUR_BIT_TILES,
    Draw,
    check_grouped,
    check_grouped4,
    check_product,
    check_product4,
    check_quantize,
    every_kernel,
)
from .test_cuda_backend import logits_of
from .test_fused import FUSED, agree, forward, joined_and_fused, quantized_layer
from .test_grouped_experts import COUNT, WIDTH, experts

READY = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not READY, reason="needs an NVIDIA GPU that torch can use, and CuPy"),
]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return cuda_device.kernels()


@pytest.mark.parametrize("name", every_kernel())
def test_every_kernel(kernels: Kernels, name: str):
    every_kernel()[name](kernels, "cuda")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("split", [1, 5])
def test_products_of_real_size(kernels: Kernels, tile, split, dtype):
    for m, n, k in ((1, 576, 1536), (511, 1027, 4096), (300, 4096, 14336)):
        check_product(kernels, m, n, k, dtype, bias=True, seed=2, tile=tile, split=split, device="cuda")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [32, 64, 128, 14336])
def test_products_with_4_bit_weights_of_real_size(kernels: Kernels, group, dtype):
    for m, n, k in ((1, 576, 1536), (8, 4096, 14336)):
        check_product4(kernels, m, n, k, dtype, group=group, bias=True, seed=2, call="gemv", device="cuda")
    for m, n, k in ((30, 576, 1536), (511, 1027, 4096), (300, 4096, 14336)):
        for tile in FOUR_BIT_TILES:
            check_product4(kernels, m, n, k, dtype, group=group, bias=True, seed=2, tile=tile, device="cuda")


@pytest.mark.parametrize("tile", FOUR_BIT_TILES, ids=lambda tile: tile.name)
def test_experts_with_4_bit_weights_of_real_size(kernels: Kernels, tile):
    counts = [0, 700, 3, 129, 64, 0, 1, 500]
    check_grouped4(kernels, counts, 2048, 1024, torch.bfloat16, group=64, bias=True, seed=3, tile=tile, device="cuda")


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


@pytest.fixture
def as_in_a_run() -> None:
    """Any algorithm is allowed; for the kernels' own tests it is not, so that memory comes poisoned."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("as_in_a_run")
@pytest.mark.parametrize("scheme", ["token", "static"])
@pytest.mark.parametrize("architecture", FUSED)
def test_a_layer_is_fused_and_computes_what_it_computed(architecture: str, scheme: str):
    """The kernels are tried against torch's norms and SiLU on the GPU, whose last places are not the CPU's."""
    backend = CudaBackend()
    model, layer = quantized_layer(architecture, backend, scheme)
    layer.to(backend.device)
    hidden = model.embed(torch.randint(0, 257, (2, 20)))
    wanted = forward(model, layer, hidden)
    assert joined_and_fused(model, layer, backend) == FUSED[architecture]
    agree(forward(model, layer, hidden), wanted, hidden)


@pytest.mark.usefixtures("as_in_a_run")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"scheme": "static", "scales": [0.01 * 2**number for number in range(COUNT)]},
        {"formats": (WeightFormat(4, 32), WeightFormat(4))},
    ],
)
def test_grouped_experts_do_not_wait_for_the_device(case: dict):
    made = experts(CudaBackend(), **case).to("cuda")
    chosen = torch.randint(0, COUNT - 1, (40, 1)) + torch.arange(2)
    routing = [tensor.cuda() for tensor in (torch.randn(40, WIDTH), chosen, torch.rand(40, 2))]
    wanted = made(*routing)
    grouped = GroupedExperts.of(made)
    once = grouped(*routing)  # compiles and loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = grouped(*routing)
        with pytest.raises(RuntimeError):
            made(*routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, once)
    assert torch.equal(again, wanted), "offloading changes no bit"


@pytest.mark.usefixtures("as_in_a_run")
@pytest.mark.parametrize("quantizer", [RTN(), RTN(weight_bits=4, group=32)], ids=["int8", "int4"])
@pytest.mark.parametrize("architecture", FUSED)
def test_a_run_comes_near_the_reference(architecture: str, quantizer: RTN):
    """Attention is torch's on the GPU, whose sums differ; the products' bits are checked above."""
    model = LayeredModel(TinyModel(architecture).folder())  # type: ignore[arg-type]
    prompt = torch.randint(0, 257, (1, 40))
    wanted = logits_of(model, ReferenceBackend(), prompt, quantizer)
    torch.cuda.reset_peak_memory_stats()  # an earlier test may have set a higher peak
    before = torch.cuda.max_memory_allocated()
    got = logits_of(model, CudaBackend(), prompt, quantizer)  # moves the model's own weights, hence last
    assert torch.cuda.max_memory_allocated() > before
    for ours, reference in zip(got, wanted, strict=True):
        assert (ours.cpu() - reference).norm() / reference.norm() < 0.05
