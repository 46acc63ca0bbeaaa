"""Run the router of a Mixture of Experts in a native CPU kernel: softmax over all experts, then top-k."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.cpu import library
from haq_lab.runtime.equivalence import make_probe

CLOSE = 1e-4  # tolerance of gate weights, whose float32 sums are added in another order


class RouterParts(ctypes.Structure):
    """`Router` of kernels/cpu/moe.h."""

    _fields_ = [("weight", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("experts", "chosen", "normalized"))]


class NativeRouter(nn.Module):
    """A router that is computed by the native kernel.

    The native decoder uses the same kernel, so each token gets the same experts with and without offloading.

    Args:
        weight: The original router's weight, float32 (experts, d). It must not move afterwards.
        chosen: Number of experts per token, k.
        normalized: Whether the gate weights of a token are divided by their sum.
    """

    def __init__(self, weight: nn.Parameter, chosen: int, normalized: bool):
        super().__init__()
        self.weight = weight
        self.parts = RouterParts(weight.data_ptr(), weight.shape[0], chosen, normalized)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden: Hidden states (..., d) of t tokens.

        Returns:
            Logits float32 (t, experts), gate weights float32 (t, k) and expert numbers int64 (t, k).

        Raises:
            MemoryError: The kernel could not allocate its buffers.
        """
        rows = hidden.reshape(-1, self.weight.shape[1]).float().contiguous()
        logits = rows.new_empty(len(rows), self.parts.experts)
        weights = rows.new_empty(len(rows), self.parts.chosen)
        chosen = torch.empty(weights.shape, dtype=torch.int64)
        failed = library.library().haq_route(
            library.level(), torch.get_num_threads(), ctypes.byref(self.parts), rows.data_ptr(), *rows.shape,
            logits.data_ptr(), weights.data_ptr(), chosen.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"The native router has no memory for {len(rows)} tokens. Use a shorter prompt.")
        return logits, weights, chosen


@torch.no_grad()
def native_router(router: nn.Module, normalized: bool, backend: Backend) -> NativeRouter | None:
    """Return a native router with the results of `router`, checked on random rows.

    Args:
        router: The model's router.
        normalized: Whether it divides the gate weights of a token by their sum (`Moe.is_normalized`).
        backend: The backend of the experts.

    Returns:
        None if the backend is not native, or if the native router gives other results.
    """
    weight: Any = getattr(router, "weight", None)
    others = {name for name, _ in (*router.named_parameters(), *router.named_buffers())} - {"weight"}
    if not backend.native or not _is_float32(weight) or others:  # the kernel has no bias
        return None
    x = make_probe(weight.shape[1], backend.device)
    try:
        _, weights, chosen = router(x)
    except (TypeError, ValueError, RuntimeError):  # it is called or answers differently
        return None
    candidate = NativeRouter(weight, chosen.shape[1], normalized)
    _, native_weights, numbers = candidate(x)
    # On large rows one expert gets nearly all weight, so the order of the others is undefined.
    same = (numbers == chosen) | (weights < CLOSE)
    agrees = bool(same.all()) and torch.allclose(native_weights, weights.float(), rtol=0, atol=CLOSE)
    return candidate if agrees else None


def _is_float32(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.dtype == torch.float32 and weight.is_contiguous()
