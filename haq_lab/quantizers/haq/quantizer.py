"""The HAQ quantizer: smoothed-Hessian quantization to W8A8 (arXiv 2508.07329), and our own additions.

With D = diag(s) and an orthogonal R, the quantised layer computes Q(X D^-1 R) Q(W D R)^T. Its weights are rounded with
the Hessian of the input as the layer sees it, H' = R^T D^-1 H D^-1 R.

1. `adaptive`: each input gets the factor s that equalises the energy of a channel and the cost of an error in it. The
   cost is its effect on the model's predictions (`sensitivity`). The factor has a closed form, so nothing is searched.
2. `fold`: the inputs of the down and output projections are smoothed too. Their factors are folded into the rows of the
   up and value projections.
3. `rotation`: a block Hadamard rotation spreads what the factor leaves of an outlier over the channels of its block.
4. `scale_search`, `act_order`: GPTQ solves the weights with H', optionally with searched row scales.
5. `asymmetric_calibration`: the weights are solved for the input of the quantised model (GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.families.family import Family, FoldKind, Group
from haq_lab.quantizers.base import ActivationChoice, Quantizer, Smoothing, Solution
from haq_lab.quantizers.gptq_solver import factorize, solve
from haq_lab.quantizers.grid import searched_scale, weight_scale
from haq_lab.quantizers.haq.noise import (
    best_static_scale,
    dynamic_noise,
    solved_weight_error,
    static_noise,
    uniform_sensitivity,
)
from haq_lab.quantizers.smoothing import ChannelMap, smoothing_factor
from haq_lab.utils.errors import UserError

FLOOR, TINY = 1e-6, 1e-30  # smallest energy or cost of a channel: a share of the mean, and above 0
CORRECTION_SHARE = 0.25  # share of the cross moment that is corrected; shrunk against overfitting, as in GPTQModel


@dataclass(frozen=True)
class HAQ(Quantizer):
    """HAQ, with every part that can be switched off.

    Args:
        activations: Activation scheme as for every quantizer, or `auto`: static for inputs where it adds little error,
            token-dynamic for the others.
        weight_bits: 8, 4, or `auto`: 8 or 4 for each linear and expert, with the smallest predicted KL divergence.
            Linears that are multiplied as one (query, key and value; gate and up) get the same bits.
        bits: With `auto`, the largest average number of bits of a weight, without scales.
        group: Columns of a 4-bit weight that share a scale: 128, 64 or 32; `none` for one scale a row.
        lm_head: Whether to quantise the LM head too.
        rotation: Hadamard rotation of each input, as for every quantizer.
        rotation_block: Largest block of `rotation=block`.
        adaptive: Whether to compute each channel's factor from its energy and its cost (`balancing_factor`). If false,
            SmoothQuant's factor with `smoothing_strength` is used for all groups.
        smoothing_strength: Smoothing strength if `adaptive` is false.
        fold: Modules that smoothing may be folded into: `norm`, `value` (for the output projection), `up` (for the down
            projection).
        scale_search: Whether to choose each scale of the weights by its Hessian-weighted error. If false, it is
            max|w| / qmax. If None, the scales of 4-bit weights are searched, because 8 bits gain nothing.
        act_order: Whether to solve the columns in the order of falling diag(H').
        asymmetric_calibration: Whether to solve the weights for the quantised model's own input.
        dampening_frac: Dampening: the share of mean(diag H') that is added to the diagonal.
        sensitivity: Number of calibration windows on which to measure how the model's predictions depend on each
            channel. If 0, all outputs of a linear have the same weight.
        auto_limit: With `auto`, an input is static if that adds at most this much to the predicted KL divergence, in
            nats a token. Experts of a layer share the limit in proportion to the tokens routed to them.

    Raises:
        UserError: If `activations` is `auto` and `sensitivity` is 0.
    """

    activations: Literal["token", "tensor", "static", "auto"] = "token"  # type: ignore[assignment]
    weight_bits: Literal[8, 4, "auto"] = 8  # type: ignore[assignment]
    bits: Annotated[float, Field(ge=4, le=8)] = 5.0
    rotation: Literal["none", "block", "full"] = "block"
    adaptive: bool = True
    smoothing_strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    fold: tuple[FoldKind, ...] = ("norm", "value", "up")
    scale_search: bool | None = None
    act_order: bool = True
    asymmetric_calibration: bool = False
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    sensitivity: Annotated[int, Field(ge=0)] = 8
    auto_limit: Annotated[float, Field(ge=0)] = 7e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations == "auto" and not self.sensitivity:
            raise UserError(
                "quantizer.activations: auto needs the sensitivity, but quantizer.sensitivity is 0. "
                "Choose quantizer.sensitivity=8, or another activation scheme."
            )
        if self.weight_bits == "auto" and not self.sensitivity:
            raise UserError(
                "quantizer.weight_bits: auto needs the sensitivity, but quantizer.sensitivity is 0. "
                "Choose quantizer.sensitivity=8, or 4 or 8 bits."
            )

    @property
    def weight_format(self) -> WeightFormat:
        return self.with_bits(4).weight_format if self.weight_bits == "auto" else super().weight_format

    @property
    def average_bits(self) -> float | None:
        return self.bits if self.weight_bits == "auto" else None

    def weight_error(self, weight: Tensor, statistics: InputStatistics, cost: Tensor) -> float:
        assert statistics.hessian is not None
        factor = factorize(statistics.shrunk_hessian(), self.dampening_frac, self.act_order)
        variance = statistics.hessian.diagonal() if factor is None else factor.conditional_variance()
        scale = weight_scale(weight, self.weight_format)
        return solved_weight_error(scale, cost, variance, self.weight_format) / 2

    @property
    def needs(self) -> Needs:
        return Needs(
            inputs=True, hessian=True, cross=self.asymmetric_calibration, sample=True, sensitivity=self.sensitivity
        )

    # 1. and 2. Smoothing.

    def smoothing(
        self, group: Group, family: Family, weight: Tensor, statistics: InputStatistics | None, channels: ChannelMap
    ) -> Smoothing | None:
        if group.kind not in self.fold:
            return None
        assert statistics is not None
        assert statistics.hessian is not None
        if not self.adaptive:
            largest = channels.shared_max(statistics.channel_max)
            weight_max = channels.shared_max(weight.abs().amax(dim=0))
            return Smoothing(smoothing_factor(largest, weight_max, self.smoothing_strength), self.smoothing_strength)
        cost = statistics.sensitivity or uniform_sensitivity(weight)
        energy = channels.shared_sum(statistics.hessian.diagonal())
        return Smoothing(balancing_factor(energy, channels.shared_sum(cost.channels)))

    # Activations, after 3.

    def activation(self, weight: Tensor, statistics: InputStatistics | None) -> ActivationChoice:
        assert statistics is not None
        scheme = self.activations
        if scheme in ("token", "tensor"):
            return ActivationChoice(scheme)
        cost = (statistics.sensitivity or uniform_sensitivity(weight)).channels
        scale, error = best_static_scale(statistics, cost)
        if scheme == "auto":
            added = (error - float(dynamic_noise(statistics, per_row=True) @ cost)) / 2  # nats a token
            if added > self.auto_limit * statistics.share:
                return ActivationChoice("token")
        return ActivationChoice("static", scale)

    # 4. and 5. Weights.

    def solve(self, weight: Tensor, statistics: InputStatistics | None, activation: ActivationChoice) -> Solution:
        assert statistics is not None
        assert statistics.hessian is not None
        hessian, target = statistics.shrunk_hessian(), weight
        if statistics.cross is not None:
            # The linear multiplies x + e. Its rounding noise e adds to H = E[x x^T], but not to E[x_fp x^T].
            if activation.scale is not None:
                noise = torch.diag(static_noise(statistics, activation.scale))
            else:
                noise = torch.diag(dynamic_noise(statistics, per_row=activation.scheme == "token"))
            hessian = hessian + noise
            target = self._corrected(weight, hessian, CORRECTION_SHARE * statistics.cross - noise)
        factor = factorize(hessian, self.dampening_frac, self.act_order)
        if factor is None:
            return self._fallback(weight)
        if self.weight_format.bits == 4 if self.scale_search is None else self.scale_search:
            scale = searched_scale(target, factor.conditional_variance(), self.weight_format)
        else:
            scale = weight_scale(target, self.weight_format)
        notes = {"dampening_frac": factor.dampening_frac, "dead_columns": int(factor.dead.sum())}
        levels = solve(target, factor, scale, self.weight_format.bits, self.weight_format.group)
        return Solution(levels, scale, notes, self.weight_format)

    def _corrected(self, weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
        """Return the weights (n, k) that best map the quantised linear's input to the full-precision output.

        This is the least squares solution W + W C (H + dampening)^-1 with C = E[(x_fp - x) x^T].
        """
        damped = hessian + torch.eye(len(hessian)) * self.dampening_frac * hessian.diagonal().mean()
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed or not torch.isfinite(cross).all():
            return weight
        return weight + torch.cholesky_solve((weight @ cross).t(), lower).t()


def balancing_factor(energy: Tensor, cost: Tensor) -> Tensor:
    """Return the smoothing factor s_j = (energy_j / cost_j)^(1/4), scaled to a geometric mean of 1.

    If the largest value of a row is a constant times its norm, rounding x / s costs E|x / s|^2 times the sum of c s^2.
    This factor minimises the product: the energy E[x^2] / s^2 and the cost c s^2 of every channel become equal.

    Args:
        energy: (k,) mean square of each channel.
        cost: (k,) cost of a squared error in each channel.

    Returns:
        (k,) positive.
    """
    logs = [values.clamp(min=max(float(values.mean()) * FLOOR, TINY)).log() for values in (energy, cost)]
    factor = (logs[0] - logs[1]) / 4
    return (factor - factor.mean()).exp()
