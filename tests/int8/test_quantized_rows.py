"""Linears give bit-identical results for QuantizedRows and for the float tensor. Other code cannot read them."""

from __future__ import annotations

import pytest
import torch

from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear, MergedLinear, QuantizedRows


def linear(rows: int, backend: ReferenceBackend) -> Int8Linear:
    levels = torch.randint(-127, 128, (rows, 32), dtype=torch.int8)
    return Int8Linear(levels, torch.rand(rows) + 0.1, torch.randn(rows), "token", None, backend)


def quantized(x: torch.Tensor, backend: ReferenceBackend) -> QuantizedRows:
    return QuantizedRows(*backend.quantize(x.view(-1, x.shape[-1]), "token", None), x.shape, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_bit_identical_to_those_for_the_float_tensor(dtype):
    backend = ReferenceBackend()
    members, x = [linear(rows, backend) for rows in (8, 5)], torch.randn(2, 3, 32, dtype=dtype)
    rows = quantized(x, backend)
    wanted = [member(x) for member in members]
    for _ in range(2):
        for got, expected in zip([member(rows) for member in members], wanted, strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, expected)
        merged = MergedLinear(members) if members[0].merged is None else members[0].merged
    assert merged._input is None
    assert not torch.equal(members[0](quantized(2 * x, backend)), wanted[0])


def test_it_has_the_float_tensors_shape_and_type():
    rows = quantized(torch.randn(2, 3, 32), ReferenceBackend())
    assert rows.shape == rows.size() == (2, 3, 32)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize(
    "read",
    [
        lambda x, rows: x + rows,
        lambda x, rows: rows * x,
        lambda x, rows: torch.nn.functional.linear(rows, x),
        lambda x, rows: torch.cat([x, rows]),
        lambda x, rows: torch.nn.Linear(32, 4)(rows),
        lambda x, rows: rows[0],
    ],
)
def test_torch_functions_raise_type_error(read):
    x = torch.randn(3, 32)
    with pytest.raises(TypeError):
        read(x, quantized(x, ReferenceBackend()))
