"""The HAQ quantizer: smoothed-Hessian quantization to W8A8 (arXiv 2508.07329), and our own additions.

With D = diag(s), the quantised layer computes Q(X D^-1) Q(W D)^T. Its error has two parts. Smoothing lowers one of
them and raises the other:

    weights      tr(dW' H' dW'^T)      with H' = D^-1 H D^-1
    activations  E ||dX' W'^T||^2      under the activation scheme in use

1. `adaptive`: each group gets the factor with the smallest predicted sum of the two (`error_model.py`). Each error is
   weighted by its effect on the model's predictions (`sensitivity`).
2. `fold`: the inputs of the down and output projections are smoothed too. Their factors are folded into the rows of the
   up and value projections.
3. `scale_search`, `act_order`: GPTQ solves the weights with H', optionally with searched row scales.
4. `asymmetric_calibration`: the weights are solved for the input of the quantised model (GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.architectures import Family, FoldKind, Group
from haq_lab.quantizers.base import ActivationChoice, Quantizer, Smoothing, Solution
from haq_lab.quantizers.gptq_solver import Factor, conditional_variance, factorize, solve
from haq_lab.quantizers.grid import searched_scale, weight_scale
from haq_lab.quantizers.haq.error_model import ErrorPredictor
from haq_lab.quantizers.haq.noise import StaticNoise, dynamic_noise, solved_weight_error, uniform_sensitivity
from haq_lab.quantizers.smoothing import ChannelMap, smoothing_factor
from haq_lab.utils.errors import UserError
from haq_lab.utils.threads import one_thread

STRENGTHS = tuple(step / 16 for step in range(17))
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
        adaptive: Whether to choose each group's factor by its predicted error. If false, `smoothing_strength` is used
            for all groups.
        smoothing_strength: Smoothing strength if `adaptive` is false.
        fold: Modules that smoothing may be folded into: `norm`, `value` (for the output projection), `up` (for the down
            projection).
        scale_search: Whether to choose each row's scale by its Hessian-weighted error. If false, it is max|w| / qmax.
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
    adaptive: bool = True
    smoothing_strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    fold: tuple[FoldKind, ...] = ("norm", "value", "up")
    scale_search: bool = False
    act_order: bool = True
    asymmetric_calibration: bool = False
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    sensitivity: Annotated[int, Field(ge=0)] = 8
    auto_limit: Annotated[float, Field(ge=0)] = 2.5e-4

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
        variance = conditional_variance(statistics.shrunk_hessian(), self.dampening_frac, self.act_order)
        if variance is None:
            assert statistics.hessian is not None
            variance = statistics.hessian.diagonal()
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
        candidates = list(self._candidates(weight, statistics, channels))
        if not self.adaptive:
            return candidates[0]
        predictor = self._predictor(weight, statistics)
        with one_thread():
            if self.activations != "auto":
                return predictor.choose(self.activations, candidates, channels)
            static, token = (predictor.choose(scheme, candidates, channels) for scheme in ("static", "token"))
        good_enough = self._static_is_good_enough(predictor, statistics.share, static.factor, token.factor)
        return static if good_enough else token

    def _predictor(self, weight: Tensor, statistics: InputStatistics) -> ErrorPredictor:
        variance = conditional_variance(statistics.shrunk_hessian(), self.dampening_frac, self.act_order)
        return ErrorPredictor(weight, statistics, variance, self.weight_format.bits)

    def _candidates(self, weight: Tensor, statistics: InputStatistics, channels: ChannelMap) -> Iterator[Smoothing]:
        """Yield the smoothing factors to choose from, in SmoothQuant's form with several measures of a channel's size.

        The maximum represents outliers, and the root mean square represents typical tokens. Their geometric mean is
        between the two.
        """
        assert statistics.hessian is not None
        weight_max = channels.shared_max(weight.abs().amax(dim=0))
        largest = channels.shared_max(statistics.channel_max)
        if not self.adaptive:
            yield Smoothing(smoothing_factor(largest, weight_max, self.smoothing_strength), self.smoothing_strength)
            return
        typical = channels.shared_max(statistics.hessian.diagonal().sqrt())
        yield Smoothing(torch.ones_like(weight_max), 0.0)
        for size in (largest, (largest * typical).sqrt(), typical):
            for strength in STRENGTHS:
                yield Smoothing(smoothing_factor(size, weight_max, strength), strength)

    # Activations.

    def _static_is_good_enough(self, predictor: ErrorPredictor, share: float, static: Tensor, token: Tensor) -> bool:
        """Return whether `auto` chooses static, given the best factors (k,) for static and for token-dynamic scales."""
        (as_static,), (as_token,) = predictor.errors("static", [static]), predictor.errors("token", [token])
        return as_static - as_token <= self.auto_limit * share

    def activation(self, weight: Tensor, statistics: InputStatistics | None) -> ActivationChoice:
        assert statistics is not None
        scheme = self.activations
        if scheme == "auto":
            predictor = self._predictor(weight, statistics)
            smoothed = torch.ones(weight.shape[1])
            good_enough = self._static_is_good_enough(predictor, statistics.share, smoothed, smoothed)
            scheme = "static" if good_enough else "token"
        if scheme != "static":
            return ActivationChoice(scheme)
        cost = statistics.sensitivity or uniform_sensitivity(weight)
        scale, _ = StaticNoise(statistics).best_scale(torch.ones(weight.shape[1]), cost.channels)
        return ActivationChoice("static", scale)

    # 3. and 4. Weights.

    def solve(self, weight: Tensor, statistics: InputStatistics | None, activation: ActivationChoice) -> Solution:
        assert statistics is not None
        assert statistics.hessian is not None
        hessian, target = statistics.shrunk_hessian(), weight
        if statistics.cross is not None:
            # The linear multiplies x + e. Its rounding noise e adds to H = E[x x^T], but not to E[x_fp x^T].
            if activation.scale is not None:
                noise = torch.diag(StaticNoise(statistics)(activation.scale.expand(len(hessian))))
            else:
                noise = torch.diag(dynamic_noise(statistics, per_row=activation.scheme == "token"))
            hessian = hessian + noise
            target = self._corrected(weight, hessian, CORRECTION_SHARE * statistics.cross - noise)
        factor = self._factor(hessian)
        if factor is None:
            return self._fallback(weight)
        if self.scale_search:
            scale = searched_scale(target, factor.conditional_variance(), self.weight_format)
        else:
            scale = weight_scale(target, self.weight_format)
        notes = {"dampening_frac": factor.dampening_frac, "dead_columns": int(factor.dead.sum())}
        levels = solve(target, factor, scale, self.weight_format.bits, self.weight_format.group)
        return Solution(levels, scale, notes, self.weight_format)

    def _factor(self, hessian: Tensor) -> Factor | None:
        return factorize(hessian, self.dampening_frac, self.act_order)

    def _corrected(self, weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
        """Return the weights (n, k) that best map the quantised linear's input to the full-precision output.

        This is the least squares solution W + W C (H + dampening)^-1 with C = E[(x_fp - x) x^T].
        """
        damped = hessian + torch.eye(len(hessian)) * self.dampening_frac * hessian.diagonal().mean()
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed or not torch.isfinite(cross).all():
            return weight
        return weight + torch.cholesky_solve((weight @ cross).t(), lower).t()
