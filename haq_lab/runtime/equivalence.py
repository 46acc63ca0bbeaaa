"""Whether a fused kernel does what a module does: tried on random rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from haq_lab.int8.backend import Backend

ROWS, WIDTH = 16, 64
CLOSE = 1e-5  # of a scale: a hundred of float32's last places, far less than another epsilon or activation changes
RARE = 0.01  # share of levels that may lie beside their neighbour, where the last places decide


def probe(width: int, device: torch.device) -> Tensor:
    """Random rows (16, width) of very different size: small ones show a norm's epsilon, large ones an activation."""
    rows = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
    return (rows * torch.logspace(-4, 2, ROWS)[:, None]).to(device)


def alike(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    """Whether two quantised matrices, int8 (m, k) and m scales each, are one but for float32's last places."""
    apart = (got[0].int() - wanted[0].int()).abs()
    scale, other = got[1].flatten(), wanted[1].flatten()
    near = ((scale - other).abs() <= CLOSE * other).all()
    return bool(near and apart.max() <= 1 and apart.float().mean() <= RARE)


def is_silu(act_fn: Callable[[Tensor], Tensor], backend: Backend) -> bool:
    """Whether an activation, times another input, is what the backend's SwiGLU is."""
    gate, up = probe(2 * WIDTH, backend.device).chunk(2, dim=1)
    return alike(backend.swiglu_quantize(gate, up, "token", None), backend.quantize(act_fn(gate) * up, "token", None))
