"""Run the router of a Mixture of Experts in a native CPU kernel.

Scores are a softmax over all experts, sigmoids with a correction of the choice and groups of experts (DeepSeek-V3,
arXiv 2412.19437), or SparseMixer's (arXiv 2409.12136). Which of them a router computes is found by trying.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.cpu import library
from haq_lab.runtime.equivalence import make_probe

CLOSE = 1e-4  # tolerance of gate weights, whose float32 sums are added in another order


SOFTMAX, SIGMOID, SPARSE_MIXER = range(3)  # `Scores` of kernels/cpu/moe.h
CORRECTION = "e_score_correction_bias"  # of transformers' routers that have one


class RouterParts(ctypes.Structure):
    """`Router` of kernels/cpu/moe.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "correction")),
        *((name, ctypes.c_int64) for name in ("experts", "chosen", "scores", "groups", "chosen_groups", "normalized")),
        *((name, ctypes.c_float) for name in ("factor", "jitter")),
    ]


class NativeRouter(nn.Module):
    """A router that is computed by the native kernel.

    The native decoder uses the same kernel, so each token gets the same experts with and without offloading.

    Args:
        weight: The original router's weight, float32 (experts, d). It must not move afterwards.
        chosen: Number of experts per token, k.
        normalized: Whether the gate weights of a token are divided by their sum.
        correction: Added to the scores for the choice alone, float32 (experts,). It must not move afterwards.
        form: Further fields of `RouterParts`. By default scores are a softmax, without groups and factor.
    """

    def __init__(
        self, weight: nn.Parameter, chosen: int, normalized: bool, correction: Tensor | None = None, **form: float
    ):
        super().__init__()
        self.weight = weight
        if correction is not None:
            self.register_buffer(CORRECTION, correction)
        form = {"groups": 1, "chosen_groups": 1, "factor": 1.0, **form}
        self.parts = RouterParts(
            weight=weight.data_ptr(),
            correction=None if correction is None else correction.data_ptr(),
            experts=weight.shape[0],
            chosen=chosen,
            normalized=normalized,
            **form,
        )

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
    others = {name for name, _ in (*router.named_parameters(), *router.named_buffers())} - {"weight", CORRECTION}
    if not backend.native or not _is_float32(weight) or others:  # the kernel has no bias
        return None
    # Rows of the size of a norm's outputs, because large logits have sigmoids that are equal.
    x = F.rms_norm(make_probe(weight.shape[1], backend.device), weight.shape[1:])
    try:
        _, weights, chosen = router(x)
    except (TypeError, ValueError, RuntimeError):  # it is called or answers differently
        return None
    for form in _forms(router):
        candidate = NativeRouter(weight, chosen.shape[1], normalized, **form)
        _, native_weights, numbers = candidate(x)
        if "correction" in form:  # transformers does not sort these experts
            (numbers, native_weights), (chosen, weights) = _sorted(numbers, native_weights), _sorted(chosen, weights)
        # Where one expert gets nearly all weight, the order of the others is undefined.
        same = (numbers == chosen) | (weights < CLOSE)
        if same.all() and torch.allclose(native_weights, weights.float(), rtol=0, atol=CLOSE):
            return candidate
    return None


def _forms(router: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments of native routers that may compute the same, from what the router has."""
    factor = getattr(router, "routed_scaling_factor", 1.0)
    if (correction := getattr(router, CORRECTION, None)) is not None:
        groups, chosen_groups = getattr(router, "num_group", 1), getattr(router, "topk_group", 1)
        form = {"scores": SIGMOID, "groups": groups, "chosen_groups": chosen_groups, "factor": factor}
        if correction.dtype == torch.float32 and correction.is_contiguous():
            yield {"correction": correction, **form}
        return
    yield {"factor": factor}
    if (jitter := getattr(router, "router_jitter_noise", None)) is not None:
        yield {"scores": SPARSE_MIXER, "jitter": jitter}


def _sorted(numbers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return experts (t, k) and their weights (t, k) in the order of their numbers."""
    numbers, order = numbers.sort(dim=1)
    return numbers, weights.gather(1, order)


def _is_float32(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.dtype == torch.float32 and weight.is_contiguous()
