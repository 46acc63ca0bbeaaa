"""A linear layer that holds int8 weights and runs on a backend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.numerics import Activations


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights and int8 activations (`haq_lab.int8.numerics` has the contract).

    Args:
        weight: int8 (n, k).
        weight_scale: float32 (n,).
        bias: (n,) or None.
        scheme: How activations are quantised.
        input_scale: float32 scalar, for the static scheme.
        backend: What computes it.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        scheme: Activations,
        input_scale: Tensor | None,
        backend: Backend,
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.scheme: Activations = scheme
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) -> (..., n)."""
        y = self.backend.linear(
            x.reshape(-1, x.shape[-1]),
            self.weight,
            self.weight_scale,
            self.bias,
            self.scheme,
            self.input_scale,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def product(self, qx: Tensor, row_scale: Tensor) -> Tensor:
        """An input that is quantised already, (m, k) and (m, 1) -> float32 (m, n)."""
        return self.backend.product(qx, row_scale, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"in={columns}, out={rows}, activations={self.scheme}, backend={self.backend.name}"


def weight_bytes(module: nn.Module) -> int:
    """Bytes that a module's parameters and buffers really take, each storage counted once (ties, views)."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def parameter_count(module: nn.Module) -> int:
    """Entries of all weights, scales left out: what the model would hold at full precision."""
    tensors = {
        tensor.data_ptr(): tensor.numel()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if name.rpartition(".")[2] in ("weight", "bias") and tensor is not None
    }
    return sum(tensors.values())


def to_float(linear: Int8Linear) -> Tensor:
    """The weights it stands for, float32 (n, k)."""
    return linear.weight.to(torch.float32) * linear.weight_scale[:, None]
