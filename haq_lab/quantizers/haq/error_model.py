"""Predict the error of a smoothing factor, and choose the factor with the smallest one."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.numerics import QMAX, ActivationScheme
from haq_lab.quantizers.base import Smoothing
from haq_lab.quantizers.grid import qmax, row_scales
from haq_lab.quantizers.haq.channel_search import DynamicError, refine
from haq_lab.quantizers.haq.noise import (
    COARSE,
    StaticNoise,
    dynamic_noise,
    sample_rows,
    solved_weight_error,
    uniform_sensitivity,
)
from haq_lab.quantizers.smoothing import ChannelMap


class ErrorPredictor:
    """Predicts the error of weights and activations after smoothing one group.

    With a sensitivity, the error is a KL divergence in nats a token. Otherwise it is half the squared error of the
    outputs.

    Args:
        weight: (n, k) stacked weights before smoothing. Rows beyond the sensitivity's outputs, a router's, are not
            rounded.
        statistics: Statistics of the input before smoothing.
        variance: (k,) conditional variances of the input. If None, the error of the weights is left out.
        bits: Bits of a weight.
    """

    def __init__(self, weight: Tensor, statistics: InputStatistics, variance: Tensor | None, bits: int):
        self._cost = statistics.sensitivity or uniform_sensitivity(weight)
        self._weight, self._bits = weight[: len(self._cost.outputs)], bits
        self._variance = torch.zeros(weight.shape[1]) if variance is None else variance
        self._ranges = replace(statistics, hessian=None, cross=None, sensitivity=None)

    @cached_property
    def _static(self) -> StaticNoise:
        return StaticNoise(self._ranges)

    def errors(self, scheme: ActivationScheme, factors: list[Tensor], every: int = 1) -> list[float]:
        """Predict the error of each smoothing factor.

        Args:
            scheme: Activation scheme.
            factors: Smoothing factors (k,).
            every: Use one in this many sampled rows.
        """
        scales = row_scales(self._weight, factors, self._bits)
        return [self._error(scheme, *each, every) for each in zip(factors, scales, strict=True)]

    def _error(self, scheme: ActivationScheme, factor: Tensor, rows: Tensor, every: int) -> float:
        rounding = solved_weight_error(rows, self._cost.outputs, self._variance / factor.square())
        if scheme == "static":
            disturbance = self._static.best_scale(factor, self._cost.channels)[1]
        else:
            noise = dynamic_noise(self._ranges, scheme == "token", every, factor)
            disturbance = float(noise @ (self._cost.channels * factor.square()))
        return (rounding + disturbance) / 2

    def choose(self, scheme: ActivationScheme, candidates: list[Smoothing], channels: ChannelMap) -> Smoothing:
        """Return the candidate with the smallest predicted error. With dynamic scales, each channel is then refined."""
        best = self._best(scheme, candidates, COARSE)
        if scheme == "static":
            return best  # refining static scales lowered the prediction, but the model got worse
        refined = replace(best, factor=refine(best.factor, self._dynamic(scheme), channels))
        return self._best(scheme, [best, refined])

    def _best(self, scheme: ActivationScheme, candidates: list[Smoothing], every: int = 1) -> Smoothing:
        errors = self.errors(scheme, [candidate.factor for candidate in candidates], every)
        return candidates[errors.index(min(errors))]

    def _dynamic(self, scheme: ActivationScheme) -> DynamicError:
        rows, share = self._ranges.channel_max[None], torch.ones(1)
        if scheme == "token":
            rows, share = sample_rows(self._ranges)
        weight = self._weight.abs() / qmax(self._bits)
        return DynamicError(rows.abs() / QMAX, share, weight, self._cost, self._variance)
