"""HAQ: smoothed-Hessian quantization, joint W8A8 (arXiv 2508.07329), with the parts that the paper leaves open.

With D = diag(s), the deployed layer computes Q(X D^-1) Q(W D)^T. Its error has two parts, and smoothing trades
one for the other:

    weights      tr(dW' H' dW'^T)      with H' = D^-1 H D^-1
    activations  E ||dX' W'^T||^2      under the activation scheme in force

1. `adaptive`: each group takes the factor with the least sum of the two, predicted (`error_predictor.py`), each error
   weighted by what it costs the model's predictions (`sensitivity`).
2. `fold`: the down and output projections are smoothed too, through the rows of up and value projections.
3. `scale_search`, `act_order`: the weights are solved under H' by GPTQ, with searched row scales.
4. `asymmetric_calibration`: the weights are solved for the input that the quantised model sees (GPTAQ,
   arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.models.architectures import Family, FoldKind, Group
from haq_lab.quantizers.base import ActivationChoice, Quantizer, Smoothing, Solution
from haq_lab.quantizers.gptq_solver import Factor, conditional_variance, factorize, solve
from haq_lab.quantizers.grid import row_scale, searched_row_scale
from haq_lab.quantizers.haq.error_model import ErrorPredictor
from haq_lab.quantizers.haq.noise import StaticNoise, dynamic_noise, every_output_alike
from haq_lab.quantizers.smoothing import Channels, factor_of
from haq_lab.utils.errors import UserError
from haq_lab.utils.threads import one_thread

STRENGTHS = tuple(step / 16 for step in range(17))
TRUST = 0.25  # of the correction for earlier layers: a regression on calibration text, shrunk as GPTQModel shrinks it


@dataclass(frozen=True)
class HAQ(Quantizer):
    """Args:
    activations: As for every quantizer, or `auto`: static where it costs little, token-dynamic elsewhere.
    adaptive: Choose each group's factor by its predicted error; else `smoothing_strength` everywhere.
    smoothing_strength: The strength where `adaptive` is off.
    fold: What smoothing is folded into: norms, value (for the output projection), up (for down).
    scale_search: Choose each row's scale by its Hessian-weighted error, else max|w| / qmax.
    act_order: Solve the columns by falling diag(H').
    asymmetric_calibration: Solve for the quantised model's own input.
    dampening_frac: Share of mean(diag H') added to the diagonal.
    sensitivity: Windows of the calibration text from which it is measured how much the model's predictions depend
        on each channel; 0: every output of a linear counts alike.
    auto_limit: With `auto`, an input is static where that adds at most so much to the predicted KL divergence, in
        nats a token. Experts have it together: each may add its share, by the tokens routed to it.
    """

    activations: Literal["token", "tensor", "static", "auto"] = "token"  # type: ignore[assignment]
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
        if self.activations == "auto" and not self.sensitivity:
            raise UserError(
                "quantizer.activations: auto weighs errors in nats, for which quantizer.sensitivity must not be 0"
            )

    @property
    def needs(self) -> Needs:
        return Needs(
            inputs=True, hessian=True, cross=self.asymmetric_calibration, sample=True, sensitivity=self.sensitivity
        )

    # 1. and 2. Smoothing.

    def smoothing(
        self, group: Group, family: Family, weight: Tensor, statistics: InputStatistics | None, channels: Channels
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
                return predictor.least(self.activations, candidates, channels)
            static, token = (predictor.least(scheme, candidates, channels) for scheme in ("static", "token"))
        affords = self._affords_static(predictor, statistics.share, static.factor, token.factor)
        return static if affords else token

    def _predictor(self, weight: Tensor, statistics: InputStatistics) -> ErrorPredictor:
        variance = conditional_variance(statistics.shrunk_hessian(), self.dampening_frac, self.act_order)
        return ErrorPredictor(weight, statistics, variance, self.weight_bits)

    def _candidates(self, weight: Tensor, statistics: InputStatistics, channels: Channels) -> Iterator[Smoothing]:
        """Factors to choose from: SmoothQuant's form, over what stands for a channel's size.

        Its maximum covers outliers, its root mean square what most tokens lose; the geometric mean lies between.
        """
        assert statistics.hessian is not None
        weight_max = channels.shared_max(weight.abs().amax(dim=0))
        largest = channels.shared_max(statistics.channel_max)
        if not self.adaptive:
            yield Smoothing(factor_of(largest, weight_max, self.smoothing_strength), self.smoothing_strength)
            return
        typical = channels.shared_max(statistics.hessian.diagonal().sqrt())
        yield Smoothing(torch.ones_like(weight_max), 0.0)
        for size in (largest, (largest * typical).sqrt(), typical):
            for strength in STRENGTHS:
                yield Smoothing(factor_of(size, weight_max, strength), strength)

    # Activations.

    def _affords_static(self, predictor: ErrorPredictor, share: float, static: Tensor, token: Tensor) -> bool:
        """Whether `auto` takes static scales, for the best factor (k,) under either scheme."""
        (as_static,), (as_token,) = predictor.errors("static", [static]), predictor.errors("token", [token])
        return as_static - as_token <= self.auto_limit * share

    def activation(self, weight: Tensor, statistics: InputStatistics | None) -> ActivationChoice:
        assert statistics is not None
        scheme = self.activations
        if scheme == "auto":
            predictor = self._predictor(weight, statistics)
            smoothed = torch.ones(weight.shape[1])
            affords = self._affords_static(predictor, statistics.share, smoothed, smoothed)
            scheme = "static" if affords else "token"
        if scheme != "static":
            return ActivationChoice(scheme)
        cost = statistics.sensitivity or every_output_alike(weight)
        scale, _ = StaticNoise(statistics).best_scale(torch.ones(weight.shape[1]), cost.channels)
        return ActivationChoice("static", scale)

    # 3. and 4. Weights.

    def solve(self, weight: Tensor, statistics: InputStatistics | None, activation: ActivationChoice) -> Solution:
        assert statistics is not None
        assert statistics.hessian is not None
        hessian, target = statistics.shrunk_hessian(), weight
        if statistics.cross is not None:
            # What the linear multiplies is x + e: the rounding noise e adds to H and not to the cross moment.
            if activation.scale is not None:
                noise = torch.diag(StaticNoise(statistics)(activation.scale.expand(len(hessian))))
            else:
                noise = torch.diag(dynamic_noise(statistics, per_row=activation.scheme == "token"))
            hessian = hessian + noise
            target = self._corrected(weight, hessian, TRUST * statistics.cross - noise)
        factor = self._factor(hessian)
        if factor is None:
            return self._fallback(weight)
        if self.scale_search:
            scale = searched_row_scale(target, factor.conditional_variance(), self.weight_bits)
        else:
            scale = row_scale(target, self.weight_bits)
        notes = {"dampening_frac": factor.dampening_frac, "dead_columns": int(factor.dead.sum())}
        return Solution(solve(target, factor, scale, self.weight_bits), scale, notes)

    def _factor(self, hessian: Tensor) -> Factor | None:
        return factorize(hessian, self.dampening_frac, self.act_order)

    def _corrected(self, weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
        """The weights that map what the quantised linear multiplies to the full-precision output, in the least
        squares sense: W + W C (H + damp)^-1 with C = E[(x_fp - x) x^T]."""
        damped = hessian + torch.eye(len(hessian)) * self.dampening_frac * hessian.diagonal().mean()
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed or not torch.isfinite(cross).all():
            return weight
        return weight + torch.cholesky_solve((weight @ cross).t(), lower).t()
