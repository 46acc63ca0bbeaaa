"""Check on random rows whether a fused kernel computes the same as a module.

Modules with the same `computation_key` differ only in their weights, so one of them is checked for all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import FunctionType, MethodType, NoneType

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend

ROWS, WIDTH = 16, 64
# Largest relative error of a scale: about 100 ulp of float32, far less than another epsilon or activation changes.
CLOSE = 1e-5
RARE = 0.01  # largest share of levels that may differ by one, because of rounding in the last bits


def make_probe(width: int, device: torch.device) -> Tensor:
    """Return random rows (16, width) of very different magnitude.

    Small rows reveal another norm epsilon, and large rows reveal another activation.
    """
    rows = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
    return (rows * torch.logspace(-4, 2, ROWS)[:, None]).to(device)


def nearly_equal(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    """Return whether two quantised matrices, int8 (m, k) with m scales each, are equal up to float32 rounding."""
    difference = (got[0].int() - wanted[0].int()).abs()
    scale, other = got[1].flatten(), wanted[1].flatten()
    near = ((scale - other).abs() <= CLOSE * other).all()
    return bool(near and difference.max() <= 1 and difference.float().mean() <= RARE)


def is_swiglu(gating: Callable[[Tensor, Tensor], Tensor], backend: Backend) -> bool:
    """Return whether `gating(gate, up)` equals the backend's SwiGLU."""
    gate, up = make_probe(2 * WIDTH, backend.device).chunk(2, dim=1)
    return nearly_equal(
        backend.swiglu_quantize(gate, up, "token", None), backend.quantize(gating(gate, up), "token", None)
    )


def computation_key(module: nn.Module) -> Hashable:
    """Return a key that is equal for modules that compute the same function of their input and their weights.

    The key has the types of all submodules, their attributes that are numbers, texts or functions, and the shapes and
    types of their weights. It does not have the layer's index, which only selects the entry of a KV cache.
    """
    parts = tuple((name, type(part), frozenset(_plain_attributes(part))) for name, part in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)


def _plain_attributes(module: nn.Module) -> list[tuple[str, Hashable]]:
    plain = (int, float, str, NoneType, FunctionType, MethodType)
    return [(name, value) for name, value in vars(module).items() if name != "layer_idx" and isinstance(value, plain)]
