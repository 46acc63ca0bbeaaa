"""Predict the quantization errors of a group of linears, before any weight is rounded.

Rounding errors of different channels are assumed to be uncorrelated. So the cost of an activation error is a sum over
channels: the channel's noise times the cost of an error in it. This needs no product with the weights. The noise is
measured on a sample of inputs, which are rounded and clipped as in the quantised model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Sensitivity
from haq_lab.int8.numerics import round_to_grid, scale_of
from haq_lab.int8.weight_format import INT8, WeightFormat
from haq_lab.quantizers.grid import cached_rows

CLIPS = tuple(0.84**step for step in range(30))  # static scales to try, as shares of the scale without clipping
UNSEEN = 32  # assumed number of tokens with larger values than in calibration
COARSE = 4  # comparing factors needs only one in four sampled rows
TINY = 1e-30  # smallest noise, because a dead channel's 0 has no logarithm
PER_OCTAVE = 6
STEPS = 2.0 ** torch.arange(-6, 8.01, 1 / PER_OCTAVE)  # tabulated grid steps, relative to a channel's full range


def uniform_sensitivity(weight: Tensor) -> Sensitivity:
    """Return a sensitivity that gives the squared errors of all outputs the same weight.

    Args:
        weight: (n, k) stacked weights.
    """
    return Sensitivity(channels=weight.square().sum(dim=0), outputs=torch.ones(len(weight)))


def dynamic_noise(statistics: InputStatistics, per_row: bool, every: int = 1, factor: Tensor | float = 1.0) -> Tensor:
    """Return the mean squared rounding error (k,) of each channel with dynamic scales.

    Args:
        statistics: Statistics of the input, with sampled rows.
        per_row: Whether every row has its own scale. If false, one scale covers all calibration tokens. It is at least
            as large as the scale of a sequence.
        every: Use one in this many sampled rows.
        factor: (k,) smoothing factor that divides the input first.
    """
    sample, weight = sample_rows(statistics, every)
    whole = scale_of((statistics.channel_max / factor).amax())
    squares = torch.empty_like(sample)
    for rows in cached_rows(sample):
        x = sample[rows] / factor
        scale = scale_of(x.abs().amax(dim=1, keepdim=True)) if per_row else whole
        torch.square(round_to_grid(x, scale).mul_(scale).sub_(x), out=squares[rows])
    return weight @ squares


class StaticNoise:
    """The mean squared error of each channel as a function of its grid step, including clipping at 127 steps.

    With a static scale c and a smoothing factor s, the step of a channel is c * s in units of the unsmoothed channel.
    So one table serves every scale and every factor.

    Args:
        statistics: Statistics of the input, with sampled rows.
        every: Use one in this many sampled rows.
    """

    def __init__(self, statistics: InputStatistics, every: int = COARSE):
        sample, weight = sample_rows(statistics, every)
        self._full = scale_of(statistics.channel_max)
        self._beyond = expected_excess(statistics.count) * statistics.channel_max
        self._unseen = UNSEEN / (UNSEEN + statistics.count)
        rows = []
        for step in STEPS:
            scale = self._full * step
            rows.append(weight @ _squared_error(sample, scale))
        self._table = torch.stack(rows).clamp(min=TINY).log()  # (steps, k)

    def __call__(self, step: Tensor) -> Tensor:
        """Return the noise (..., k) for the channels' steps (..., k), interpolated geometrically in the table."""
        position = ((step / self._full).log2() - STEPS[0].log2()) * PER_OCTAVE
        position = position.clamp(0, len(STEPS) - 1.001)
        below = position.long()
        share = position - below
        rows = below.view(-1, below.shape[-1])
        low, high = (self._table.gather(0, index).view_as(share) for index in (rows, rows + 1))
        return (low + share * (high - low)).exp()

    def best_scale(self, factor: Tensor, cost: Tensor) -> tuple[Tensor, float]:
        """Search the static scale with the smallest error for inputs divided by `factor`.

        With n calibration tokens, one new token in n exceeds the largest value of a channel. After smoothing, hundreds
        of channels have similar ranges. A scale that just covers the calibrated values would then clip about one new
        row in ten. So the search also counts some tokens with larger values.

        Args:
            factor: (k,) smoothing factor.
            cost: (k,) cost of a squared error in each channel, before smoothing.

        Returns:
            The scale, and its error.
        """
        covering = (self._full / factor).amax()
        scales = covering * torch.tensor(CLIPS)
        steps = scales[:, None] * factor
        unseen = _squared_error(self._beyond, steps)
        errors = (self(steps) * (1 - self._unseen) + unseen * self._unseen) @ cost
        best = int(errors.argmin())
        return scales[best], float(errors[best])


def expected_excess(count: int) -> float:
    """Return the expected largest value on other texts, relative to the largest in `count` calibration tokens.

    The values were fitted: 1.4 on 1,024 and 4,096 tokens, 1.25 on 16,384 (`experiments/haq_search.md`).
    """
    return min(1.4, 1.25 * max(1.0, 16_384 / max(count, 1)) ** (1 / 12))


def _squared_error(x: Tensor, scale: Tensor) -> Tensor:
    return round_to_grid(x, scale).mul_(scale).sub_(x).square_()


def solved_weight_error(
    scale: Tensor, cost: Tensor, conditional_variance: Tensor, format: WeightFormat = INT8
) -> float:
    """Predict the error that GPTQ leaves: the sum over rows of cost * dw H dw^T.

    Each column has uniform rounding noise of variance scale^2 / 12, weighted by its conditional variance. The
    prediction is within 10 % of the measured error (`tests/quantizers`).

    Args:
        scale: (n,) row scales, or (groups, n).
        cost: (n,) cost of a squared error in each output.
        conditional_variance: (k,) from `gptq_solver.Factor`. Smoothing by s divides it by s^2.
        format: Format of the weights.
    """
    groups = [conditional_variance] if format.group is None else conditional_variance.split(format.group)
    variances = torch.stack([own.sum() for own in groups])
    return float(variances @ (scale.view(len(groups), -1).square() @ cost)) / 12


def sample_rows(statistics: InputStatistics, every: int = 1) -> tuple[Tensor, Tensor]:
    """Return sampled rows of an input.

    Args:
        statistics: Statistics of the input, with sampled rows.
        every: Use one in this many rows.

    Returns:
        The rows (r, k), and the share of all tokens (r,) that each represents.
    """
    assert statistics.sample is not None
    assert statistics.sample_weight is not None
    weight = statistics.sample_weight[::every]
    return statistics.sample[::every], weight / weight.sum()
