"""16-bit weights give the results of converted ones and are never converted as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from haq_lab.int8.cpu import library
from haq_lab.models import half_linear as narrow_linear
from haq_lab.models.half_linear import HalfLinear

HALVES = [torch.bfloat16, torch.float16]
native_or_not = pytest.mark.parametrize("has_native", [True, False])


def narrow_linear_of(dtype: torch.dtype) -> HalfLinear:
    linear = nn.Linear(48, 200, bias=False, dtype=dtype)
    return HalfLinear(linear.requires_grad_(False))


@native_or_not
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 3, narrow_linear.NATIVE_ROWS, narrow_linear.NATIVE_ROWS + 1])
def test_products_and_gradients_equal_those_of_the_converted_table(dtype, rows, has_native, monkeypatch):
    monkeypatch.setattr(library, "available", lambda: has_native)
    monkeypatch.setattr(narrow_linear, "BLOCK_BYTES", 4 * 48 * 64)  # 64 rows at a time, 8 in the last block
    narrow = narrow_linear_of(dtype)
    x = torch.randn(rows, 48)
    with torch.enable_grad():
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, wanted = narrow(ours), theirs @ narrow.weight.float().t()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        got.square().sum().backward()
        wanted.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert narrow(x.view(rows, 1, 48)).shape == (rows, 1, 200)


class Sizes(TorchDispatchMode):
    """Records the size of the largest float32 tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


@native_or_not
@pytest.mark.parametrize("rows", [1, 40])
def test_the_whole_table_is_never_converted(has_native, rows, monkeypatch):
    monkeypatch.setattr(library, "available", lambda: has_native)
    monkeypatch.setattr(narrow_linear, "BLOCK_BYTES", 4 * 48 * 64)
    narrow, x = narrow_linear_of(torch.bfloat16), torch.randn(rows, 48, requires_grad=True)
    with Sizes() as sizes, torch.enable_grad():
        narrow(x).sum().backward()
    assert x.grad is not None
    assert sizes.largest <= max(200 * rows, 48 * 64) < 200 * 48
