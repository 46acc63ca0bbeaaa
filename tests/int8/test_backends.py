"""Backends agree: cpu and reference are bit-identical in int32, fake is close in float."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from haq_lab.int8.backend import Backend, FakeBackend, PackedLinear, ReferenceBackend
from haq_lab.int8.cpu import backend as cpu
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.backend import CpuBackend, fastest, is_exact

REFERENCE, CPU = ReferenceBackend(), CpuBackend()


def cpu_without_native() -> CpuBackend:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        return CpuBackend()


CPUS = {"native": CPU, "torch": cpu_without_native()}
ISAS = library.isas() if library.available() else ()


def levels(seed: int, rows: int, columns: int) -> Tensor:
    """Random int8 in [-127, 127]. Every third row has only extreme values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    drawn[::3] = 127 if seed % 2 else -127
    return drawn


def saturating(qx: Tensor, qw: Tensor) -> Tensor:
    """Multiply like a CPU without VNNI: unsigned activations, and sums of two products saturate at 16 bits."""
    if qx.shape[1] % 2:
        qx, qw = torch.nn.functional.pad(qx, (0, 1)), torch.nn.functional.pad(qw, (0, 1))
    products = (qx.int() + 128)[:, None] * qw.int()
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - 128 * qw.int().sum(-1)).int()


@given(st.integers(0, 2**16), st.integers(0, 40), st.integers(1, 40), st.integers(1, 600))
@example(1, 3, 5, 4000)
@example(2, 33, 7, 4000)
@example(1, 1, 1, 1040)
@example(1, 2, 3, 1041)
@example(2, 600, 3, 17)
def test_cpu_equals_reference_bit_for_bit(seed, rows, outputs, columns):
    qx, qw = levels(seed, rows, columns), levels(seed + 1, outputs, columns)
    expected = qx.long() @ qw.long().t()
    for backend in (REFERENCE, CPU):
        accumulated = backend.accumulate(qx, qw)
        assert accumulated.dtype == torch.int32
        assert torch.equal(accumulated.long(), expected)


@pytest.mark.parametrize("product", cpu.CANDIDATES)
@pytest.mark.parametrize("columns", [64, 1040, 1041, 4000])
def test_a_candidate_that_is_not_exact_is_rejected(product, columns):
    if not is_exact(product, 4, 8, columns):
        assert product is not cpu._float_chunks, "the last resort has to be exact everywhere"
        return
    qx, qw = levels(3, 4, columns), levels(4, 8, columns)
    assert torch.equal(product(qx, qw), REFERENCE.accumulate(qx, qw))


@given(st.integers(1, 600), st.integers(1, 9), st.integers(2, 64))
def test_a_saturating_product_is_rejected(rows, outputs, columns):
    assert not is_exact(saturating, min(rows, 64), outputs, columns)


def test_a_saturating_product_is_exact_for_small_values():
    qx, qw = levels(1, 3, 64) // 16, levels(2, 5, 64) // 16
    assert torch.equal(saturating(qx, qw), REFERENCE.accumulate(qx, qw)), "the fake candidate is a fair one"


def test_a_product_that_raises_for_a_shape_is_rejected():
    def refuses(qx: Tensor, qw: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this shape")

    assert not is_exact(refuses, 2, 3, 4)


def test_the_fastest_exact_candidate_is_chosen(monkeypatch):
    def slow(qx: Tensor, qw: Tensor) -> Tensor:
        return REFERENCE.accumulate(qx, qw)

    seconds = {saturating: 0.0, slow: 2.0, cpu._float_chunks: 1.0}
    monkeypatch.setattr(cpu, "CANDIDATES", tuple(seconds))
    monkeypatch.setattr(cpu, "_seconds", lambda product, qx, qw: seconds[product])
    fastest.cache_clear()
    try:
        assert fastest(4, 8, 16) is cpu._float_chunks
    finally:
        fastest.cache_clear()


@given(
    st.integers(0, 2**16),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from(["token", "tensor", "static"]),
    st.booleans(),
)
def test_linear_is_bit_identical_to_the_definition_on_every_backend(seed, rows, outputs, columns, scheme, with_bias):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    qw, scale = levels(seed, outputs, columns), torch.rand(outputs, generator=generator) + 0.01
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    static = torch.tensor(0.02)

    def by(backend: Backend) -> Tensor:
        return backend.linear(x, PackedLinear(backend.pack(qw), scale, bias), scheme, static)

    reference, fake = by(REFERENCE), by(FakeBackend())
    for real in CPUS.values():
        assert torch.equal(reference, by(real))
    for isa in ISAS:
        with library.forced_isa(isa):
            assert torch.equal(reference, by(CPU))
    torch.testing.assert_close(fake, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_linear_keeps_the_type_of_its_input(dtype):
    x, qw = torch.randn(2, 8).to(dtype), levels(1, 3, 8)
    wanted = REFERENCE.linear(x, PackedLinear(qw, torch.ones(3)), "token", None)
    assert wanted.dtype == dtype
    for backend in (*CPUS.values(), FakeBackend()):
        y = backend.linear(x, PackedLinear(backend.pack(qw), torch.ones(3)), "token", None)
        assert y.dtype == dtype
        assert torch.equal(y, wanted) or not backend.exact


def test_linear_takes_rows_that_are_not_contiguous():
    x, qw = torch.randn(8, 5).t(), levels(1, 3, 8)
    wanted = REFERENCE.linear(x, PackedLinear(qw, torch.ones(3)), "token", None)
    for backend in CPUS.values():
        assert torch.equal(backend.linear(x, PackedLinear(backend.pack(qw), torch.ones(3)), "token", None), wanted)


@given(st.integers(0, 2**16), st.integers(1, 70), st.integers(1, 70))
def test_unpack_returns_the_packed_levels(seed, outputs, columns):
    qw = levels(seed, outputs, columns)
    for backend in (REFERENCE, *CPUS.values()):
        unpacked = backend.unpack(backend.pack(qw), outputs, columns)
        assert torch.equal(unpacked, qw)
        assert unpacked.dtype == torch.int8


@given(st.integers(0, 2**16), st.integers(1, 70), st.integers(1, 70))
def test_packed_weights_can_be_concatenated_if_the_backend_says_so(seed, outputs, columns):
    first, second = levels(seed, outputs, columns), levels(seed + 1, 33, columns)
    x, scale = torch.randn(3, columns), torch.rand(outputs + 33)
    for backend in (REFERENCE, *CPUS.values()):
        if backend.can_merge_rows(outputs):
            packed = torch.cat([backend.pack(first), backend.pack(second)])
            y = backend.linear(x, PackedLinear(packed, scale), "token", None)
            wanted = REFERENCE.linear(x, PackedLinear(torch.cat([first, second]), scale), "token", None)
            assert torch.equal(y, wanted)


@given(st.integers(0, 2**16), st.integers(0, 9), st.integers(1, 70), st.sampled_from(["token", "tensor", "static"]))
def test_all_backends_quantise_bit_identically(seed, rows, columns, scheme):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = REFERENCE.quantize(x.to(dtype), scheme, torch.tensor(0.02))
        for backend in CPUS.values():
            got = backend.quantize(x.to(dtype), scheme, torch.tensor(0.02))
            assert [each.shape for each in got] == [each.shape for each in wanted]
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))


def test_kernels_names_what_computes(monkeypatch):
    assert REFERENCE.kernels == "torch"
    if ISAS:
        assert CpuBackend().kernels == f"native {library.isa()}"
    monkeypatch.setattr(library, "available", lambda: False)
    monkeypatch.setattr(library, "unavailable_reason", lambda: "no C++ compiler")
    assert CpuBackend().kernels == "torch (no C++ compiler)"


@pytest.mark.skipif(not ISAS, reason="no CPU kernels here")
def test_kernels_that_are_not_exact_are_not_used(monkeypatch):
    monkeypatch.setattr(native, "accumulate", lambda qx, packed: saturating(qx, native.unpack(packed)))
    cpu.native_is_exact.cache_clear()
    try:
        assert CpuBackend().pack(levels(1, 3, 8)).dtype == torch.int8
        assert "not exact" in CpuBackend().kernels
    finally:
        cpu.native_is_exact.cache_clear()


@pytest.mark.skipif(not ISAS, reason="no CPU kernels here")
@pytest.mark.parametrize("isa", ISAS or ["none"])
def test_every_instruction_set_passes_the_check(isa):
    assert cpu.native_is_exact(isa)


@pytest.mark.parametrize("backend", [REFERENCE, *CPUS.values()], ids=["reference", *CPUS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_weights_are_dequantized(backend, dtype):
    """Level times scale in float32, then rounded to 16 bits."""
    drawn = levels(5, 40, 70)
    scale = torch.rand(40, generator=torch.Generator().manual_seed(6)) / 100
    got = backend.dequantize(backend.pack(drawn), scale, 70, dtype)
    assert got.dtype == dtype
    for row, column in ((0, 0), (17, 69), (39, 3)):
        exact = float(drawn[row, column]) * float(scale[row])  # a product of 7 and 24 bits, exact in float64
        single = torch.tensor(exact, dtype=torch.float64).float()
        assert got[row, column] == single.to(dtype)
