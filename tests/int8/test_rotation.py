"""Compare the rotation with Hadamard matrices, and every backend's with the reference, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from haq_lab.int8.backend import Backend, FakeBackend, PackedLinear, ReferenceBackend
from haq_lab.int8.cpu import bindings, library
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear, MergedLinear, can_merge, to_float
from haq_lab.int8.numerics import quantize_activations
from haq_lab.int8.rotation import block_size, rotate

# Blocks of one vector and less, of registers, of a row's rest, and larger ones; widths that are no power of two.
SHAPES = [
    (2, 2),
    (6, 2),
    (36, 4),
    (40, 8),
    (24, 8),
    (48, 16),
    (96, 32),
    (576, 64),
    (1536, 128),
    (1536, 512),
    (2048, 2048),
]
needs_native = pytest.mark.skipif(not library.available(), reason="there is no C++ compiler")


def hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


@pytest.mark.parametrize(("width", "limit", "block"), [
    (576, 128, 64), (1536, 128, 128), (1536, None, 512), (4096, 100, 64), (15, 128, 1), (64, 1, 1),
])  # fmt: skip
def test_the_largest_block_that_fits(width, limit, block):
    assert block_size(width, limit) == block


@pytest.mark.parametrize(("width", "block"), SHAPES)
def test_each_block_is_multiplied_by_a_hadamard_matrix(width, block):
    x = torch.randn(3, width)
    wanted = x.double().view(3, -1, block) @ hadamard(block) / math.sqrt(block)
    torch.testing.assert_close(rotate(x, block).double(), wanted.view(3, width), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(0, 7))
def test_the_sums_have_the_specified_order(seed, blocks, log_block):
    """Stage by stage with numpy's float32 additions, one pair at a time."""
    block = 2**log_block
    x = torch.randn(blocks * block, generator=torch.Generator().manual_seed(seed)) * 1e3
    y = x.clone()
    half = 1
    while half < block:
        for i in range(len(y)):
            if not i & half:
                a, b = y[i].clone(), y[i + half].clone()
                y[i], y[i + half] = a + b, a - b
        half *= 2
    assert torch.equal(rotate(x, block), y * torch.tensor(1 / math.sqrt(block)))


def test_a_rotation_is_its_own_inverse_and_keeps_products():
    x, w = torch.randn(5, 96), torch.randn(7, 96)
    torch.testing.assert_close(rotate(rotate(x, 32), 32), x)
    torch.testing.assert_close(rotate(x, 32) @ rotate(w, 32).t(), x @ w.t(), rtol=1e-4, atol=1e-4)
    assert rotate(x, 1) is x
    before = x.clone()
    rotate(x, 32)
    assert torch.equal(x, before)


@pytest.mark.parametrize("block", [64, 3, 6])
def test_an_impossible_block_is_refused(block):
    with pytest.raises(ValueError, match="power of two that divides 96"):
        rotate(torch.ones(1, 96), block)


@needs_native
@pytest.mark.parametrize("isa", library.isas() if library.available() else [])
@pytest.mark.parametrize(("width", "block"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_has_the_bits_of_the_reference(isa, width, block, dtype):
    x = (torch.randn(7, width) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    wanted, scale = quantize_activations(rotate(x, block), "token", None)
    static, _ = quantize_activations(rotate(x, block), "static", torch.tensor(0.01))
    with library.forced_isa(isa):
        levels, scales = bindings.quantize_rows(x, block)
        assert torch.equal(levels, wanted)
        assert torch.equal(scales[:, None], scale)
        assert torch.equal(bindings.quantize_static(x, 0.01, block), static)


@needs_native
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_so(value):
    x = torch.randn(2, 64)
    x[0, 3] = value
    _, scale = bindings.quantize_rows(x, 64)
    assert not torch.isfinite(scale[0])
    assert torch.equal(scale[1:], bindings.quantize_rows(x[1:], 64)[1])


@needs_native
def test_the_kernels_refuse_an_impossible_block():
    with pytest.raises(ValueError, match="rotation: 48 is not a power of two that divides 96 columns"):
        bindings.quantize_rows(torch.ones(1, 96), 48)


def linear(backend: Backend, rotation: int, scheme="token") -> Int8Linear:
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(-127, 128, (64, 96), dtype=torch.int8, generator=generator)
    scale, bias = (torch.rand(64, generator=generator) for _ in range(2))
    static = torch.tensor(0.02) if scheme == "static" else None
    return Int8Linear(levels, scale, bias, scheme, static, backend, rotation=rotation)


@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_rotate_alike(scheme, dtype):
    x = torch.randn(9, 96).to(dtype)
    wanted = linear(ReferenceBackend(), 32, scheme)(x)
    assert torch.equal(linear(CpuBackend(), 32, scheme)(x), wanted)
    assert wanted.dtype == dtype
    plain = linear(ReferenceBackend(), 1, scheme)(x)
    assert not torch.equal(wanted, plain)


def test_a_rotated_linear_computes_the_function_of_its_weights():
    x, w = torch.randn(50, 96), torch.randn(64, 96)
    rotated = rotate(w, 32)
    scale = rotated.abs().amax(1) / 127
    levels = (rotated / scale[:, None]).round().to(torch.int8)
    int8 = Int8Linear(levels, scale, None, "token", None, FakeBackend(), rotation=32)
    error = (int8(x) - x @ w.t()).norm() / (x @ w.t()).norm()
    assert error < 0.02
    torch.testing.assert_close(rotate(to_float(int8), 32), w, rtol=0, atol=0.05)


def test_an_outlier_costs_less_after_the_rotation():
    x, w = torch.randn(50, 128), torch.randn(64, 128)
    x[:, 5] *= 300
    errors = []
    for block in (1, 128):
        levels, scale = quantize_activations(rotate(x, block), "token", None)
        errors.append(float(((levels * scale) @ rotate(w, block).t() - x @ w.t()).square().mean()))
    assert errors[1] < 0.1 * errors[0]


def test_only_linears_with_the_same_rotation_are_merged():
    backend = ReferenceBackend()
    x = torch.randn(3, 96)
    same = [linear(backend, 32), linear(backend, 32)]
    wanted = same[0](x)
    assert can_merge(same)
    assert not can_merge([linear(backend, 32), linear(backend, 1)])
    assert torch.equal(MergedLinear(same).product(x), torch.cat([wanted, wanted], dim=1))
    assert linear(backend, 32).input_quantization != linear(backend, 1).input_quantization


def test_a_copy_on_another_backend_keeps_the_rotation():
    x, original = torch.randn(3, 96), linear(ReferenceBackend(), 32)
    assert torch.equal(original.on(CpuBackend())(x), original(x))
    assert "rotation=32" in repr(original)


@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda backend: backend.name)
def test_swiglu_is_rotated_before_it_is_quantised(backend):
    gate, up = torch.randn(2, 5, 96).unbind()
    levels, scale = backend.swiglu_quantize(gate, up, "token", None, rotation=32)
    plain = ReferenceBackend().swiglu_quantize(gate, up, "token", None, rotation=32)
    assert torch.equal(levels, plain[0])
    assert torch.equal(scale.flatten(), plain[1].flatten())
    weights = PackedLinear(backend.pack(torch.ones(4, 96, dtype=torch.int8)), torch.ones(4))
    assert backend.product(levels, scale, weights, torch.float32).shape == (5, 4)
