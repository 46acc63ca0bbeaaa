"""What a backend is: the arithmetic of one int8 linear. `reference`, `cpu` and `fake` are in their modules."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from haq_lab.errors import UserError
from haq_lab.int8.numerics import Activations, epilogue, quantize_activations


class Backend:
    """Quantise the rows, multiply in int8, scale. A backend overrides `accumulate`, or `product` as a whole."""

    name: ClassVar[str]

    def accumulate(self, qx: Tensor, qw: Tensor) -> Tensor:
        """int8 (m, k) times int8 (n, k) transposed -> int32 (m, n), exact."""
        raise NotImplementedError

    def linear(
        self,
        x: Tensor,
        qw: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        scheme: Activations,
        static_scale: Tensor | None,
    ) -> Tensor:
        """x (m, k) floating -> (m, n) of the same type; `qw` (n, k) int8, `weight_scale` (n,) float32."""
        qx, row_scale = self.quantize(x, scheme, static_scale)
        return self.product(qx, row_scale, qw, weight_scale, bias).to(x.dtype)

    def quantize(self, x: Tensor, scheme: Activations, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (m, k) floating -> int8 (m, k) and float32 scales (m, 1)."""
        return quantize_activations(x, scheme, static_scale)

    def product(self, qx: Tensor, row_scale: Tensor, qw: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        """The quantised rows times the weights, scaled: float32 (m, n)."""
        return epilogue(self.accumulate(qx, qw), row_scale, weight_scale, bias)


class ReferenceBackend(Backend):
    """Exact and simple: products of int8 values in float64, whose sums are exact up to 2^53."""

    name = "reference"

    def accumulate(self, qx: Tensor, qw: Tensor) -> Tensor:
        return (qx.double() @ qw.double().t()).to(torch.int32)


class FakeBackend(Backend):
    """The simulation others use: quantise, dequantise, multiply in float. No int8 arithmetic happens."""

    name = "fake"

    def product(self, qx: Tensor, row_scale: Tensor, qw: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(qx.float() * row_scale, qw.float() * weight_scale[:, None], bias)


def cuda() -> Backend:
    """Refused until the CUDA kernels are there."""
    raise UserError("backend: 'cuda' is not available yet; choose cpu, reference or fake")
