"""Compute a float head by the native CPU kernel, so that the logits of a token do not depend on the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.cpu.float_linear import float_linear
from haq_lab.models.half_linear import HalfLinear

TYPES = (torch.float32, torch.bfloat16, torch.float16)


class NativeHead(HalfLinear):
    """A head (n, k) whose native kernel computes the same bits for a row alone and among others.

    Torch adds in another order for one row than for many, so the last bits of its logits depend on the batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., n) for x (..., k). Torch computes other types than float32, and gradients."""
        if x.dtype != torch.float32 or (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
            return super().forward(x)
        y = float_linear(x.reshape(-1, self.in_features).contiguous(), self.weight)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def make_head_native(whole: nn.Module, backend: Backend) -> None:
    """Replace the float head of a model by a native one, in place, if the backend is native."""
    model: Any = whole
    head = model.get_output_embeddings()
    if backend.native and isinstance(head, nn.Linear) and head.weight.dtype in TYPES and head.weight.is_contiguous():
        model.set_output_embeddings(NativeHead(head))
