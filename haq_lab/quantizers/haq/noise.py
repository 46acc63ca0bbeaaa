"""Predict the rounding errors of a group's input, before any weight is rounded.

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

CLIPS = tuple(0.84**step for step in range(30))  # static scales to try, as shares of the scale without clipping
UNSEEN = 32  # assumed number of tokens with larger values than in calibration
COARSE = 4  # comparing static scales needs only one in four sampled rows


def uniform_sensitivity(weight: Tensor) -> Sensitivity:
    """Return a sensitivity that gives the squared errors of all outputs the same weight.

    Args:
        weight: (n, k) stacked weights.
    """
    return Sensitivity(channels=weight.square().sum(dim=0), outputs=torch.ones(len(weight)))


def dynamic_noise(statistics: InputStatistics, per_row: bool) -> Tensor:
    """Return the mean squared rounding error (k,) of each channel with dynamic scales.

    Args:
        statistics: Statistics of the input, with sampled rows.
        per_row: Whether every row has its own scale. If false, one scale covers all calibration tokens. It is at least
            as large as the scale of a sequence.
    """
    sample, weight = _sample_rows(statistics)
    largest = sample.abs().amax(dim=1, keepdim=True) if per_row else statistics.channel_max.amax()
    return weight @ _squared_error(sample, scale_of(largest))


def static_noise(statistics: InputStatistics, scale: Tensor, every: int = 1) -> Tensor:
    """Return the mean squared error (k,) of each channel with a static scale, including clipping at 127 steps.

    Args:
        statistics: Statistics of the input, with sampled rows.
        scale: The scale, a scalar.
        every: Use one in this many sampled rows.
    """
    sample, weight = _sample_rows(statistics, every)
    return weight @ _squared_error(sample, scale)


def best_static_scale(statistics: InputStatistics, cost: Tensor, every: int = COARSE) -> tuple[Tensor, float]:
    """Search the static scale with the smallest error.

    With n calibration tokens, one new token in n exceeds the largest value of a channel. If hundreds of channels have
    similar ranges, a scale that just covers the calibrated values clips about one new row in ten. So the search also
    counts some tokens with larger values.

    Args:
        statistics: Statistics of the input, with sampled rows.
        cost: (k,) cost of a squared error in each channel.
        every: Use one in this many sampled rows.

    Returns:
        The scale, a scalar, and its error.
    """
    unseen = UNSEEN / (UNSEEN + statistics.count)
    beyond = expected_excess(statistics.count) * statistics.channel_max
    covering = scale_of(statistics.channel_max.amax())
    scales = [covering * clip for clip in CLIPS]
    errors = [
        float(((1 - unseen) * static_noise(statistics, scale, every) + unseen * _squared_error(beyond, scale)) @ cost)
        for scale in scales
    ]
    best = errors.index(min(errors))
    return scales[best], errors[best]


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
    prediction is within 20 % of the measured error if few compensated weights leave the grid (`tests/quantizers`).

    Args:
        scale: (n,) row scales, or (groups, n).
        cost: (n,) cost of a squared error in each output.
        conditional_variance: (k,) from `gptq_solver.Factor`.
        format: Format of the weights.
    """
    groups = [conditional_variance] if format.group is None else conditional_variance.split(format.group)
    variances = torch.stack([own.sum() for own in groups])
    return float(variances @ (scale.view(len(groups), -1).square() @ cost)) / 12


def _sample_rows(statistics: InputStatistics, every: int = 1) -> tuple[Tensor, Tensor]:
    """Return one in `every` sampled rows (r, k), and the share of all tokens (r,) that each represents."""
    assert statistics.sample is not None
    assert statistics.sample_weight is not None
    weight = statistics.sample_weight[::every]
    return statistics.sample[::every], weight / weight.sum()
