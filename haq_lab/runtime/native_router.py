"""A Mixture of Experts' router as a native kernel: softmax over all experts, and the largest of it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.cpu import bindings as native
from haq_lab.runtime.equivalence import probe

CLOSE = 1e-4  # weights whose float32 sums are in another order; below it which of two is the larger is open


class RouterParts(ctypes.Structure):
    """`Router` of kernels/cpu/moe.h."""

    _fields_ = [("weight", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("experts", "chosen", "normalized"))]


class NativeRouter(nn.Module):
    """Takes a router's place, and its weight (experts, d), which must stay where it is.

    A layer that is computed in one native call uses the same kernel: whether its experts are then all in memory or
    pass through an engine, each token has the same ones.

    Args:
        weight: float32.
        chosen: Experts of a token.
        normalized: Whether a token's weights are made to sum to 1.
    """

    def __init__(self, weight: nn.Parameter, chosen: int, normalized: bool):
        super().__init__()
        self.weight = weight
        self.parts = RouterParts(weight.data_ptr(), weight.shape[0], chosen, normalized)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (..., d) float32 -> logits (t, experts), weights (t, k) and expert numbers (t, k) int64."""
        rows = hidden.reshape(-1, self.weight.shape[1]).float().contiguous()
        logits = rows.new_empty(len(rows), self.parts.experts)
        weights = rows.new_empty(len(rows), self.parts.chosen)
        chosen = torch.empty(weights.shape, dtype=torch.int64)
        failed = native.library().haq_route(
            native.level(), torch.get_num_threads(), ctypes.byref(self.parts), rows.data_ptr(), *rows.shape,
            logits.data_ptr(), weights.data_ptr(), chosen.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"routing of {len(rows)} tokens")
        return logits, weights, chosen


@torch.no_grad()
def native_router(router: nn.Module, backend: Backend) -> NativeRouter | None:
    """What does the same as `router` on random rows; None where nothing does, or the kernels are not there."""
    weight: Any = getattr(router, "weight", None)
    if not backend.native or not _plain(weight):
        return None
    x = probe(weight.shape[1], backend.device)
    try:
        _, weights, chosen = router(x)
    except (TypeError, ValueError, RuntimeError):  # no router of this kind
        return None
    for normalized in (True, False):
        made = NativeRouter(weight, chosen.shape[1], normalized)
        _, ours, numbers = made(x)
        same = (numbers == chosen) | (weights < CLOSE)  # large rows leave all but one expert next to nothing
        if same.all() and torch.allclose(ours, weights.float(), rtol=0, atol=CLOSE):
            return made
    return None


def _plain(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.dtype == torch.float32 and weight.is_contiguous()
