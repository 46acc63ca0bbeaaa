"""Compute a float head by the native CPU kernel, so that a token's logits do not depend on the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.cpu import bindings as native

TYPES = (torch.float32, torch.bfloat16, torch.float16)


class NativeHead(nn.Linear):
    """A head (n, k) whose rows are multiplied one by one, in float32.

    Torch multiplies one row in another order than many rows, so the last bits of its logits depend on the batch.

    Args:
        head: The linear whose weight and bias are shared.
    """

    def __init__(self, head: nn.Linear):
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self._torch_head = (head.forward,)  # in a tuple, so that the head is not registered twice

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., n) for x (..., k). Other types than float32, and gradients, are left to torch."""
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if x.dtype != torch.float32 or needs_gradient:
            logits: Tensor = self._torch_head[0](x)
            return logits
        rows = x.reshape(-1, self.in_features).contiguous()
        y = native.float_linear(rows, self.weight).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def make_head_native(whole: nn.Module, backend: Backend) -> None:
    """Replace the float head of a model by a native one, in place, if the backend is native."""
    model: Any = whole
    head = model.get_output_embeddings()
    if not backend.native or not isinstance(head, nn.Linear) or head.weight.dtype not in TYPES:
        return
    if head.weight.is_contiguous():
        model.set_output_embeddings(NativeHead(head))
