"""Predicted errors of a group of linears: what HAQ weighs before it rounds anything.

Rounding errors of different channels are taken as uncorrelated, so an activation error costs the noise of each
channel times what an error there costs, and needs no product with the weights. How large the noise is comes from a
sample of whole rows, rounded and clipped as they will be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Sensitivity
from haq_lab.int8.numerics import round_to_grid, scale_of
from haq_lab.quantizers.grid import cached_rows

CLIPS = tuple(0.84**step for step in range(30))  # static scales tried, as shares of the one that covers all
UNSEEN = 32  # tokens with values beyond those that calibrate
COARSE = 4  # of the sampled rows one is enough to compare factors by
TINY = 1e-30  # noise of a dead channel, so that it has a logarithm
PER_OCTAVE = 6
STEPS = 2.0 ** torch.arange(-6, 8.01, 1 / PER_OCTAVE)  # grid steps tabulated, over the one that covers a channel


def every_output_alike(weight: Tensor) -> Sensitivity:
    """Where the model's sensitivity is not known: squared errors of all outputs (n) count alike."""
    return Sensitivity(channels=weight.square().sum(dim=0), outputs=torch.ones(len(weight)))


def dynamic_noise(statistics: InputStatistics, per_row: bool, every: int = 1, factor: Tensor | float = 1.0) -> Tensor:
    """(k,) mean squared rounding error of each channel with scales taken at run time, a row's or the tensor's.

    Args:
        every: Of so many sampled rows one is looked at.
        factor: (k,) that the input is divided by first.
    """
    sample, weight = sampled(statistics, every)
    whole = scale_of((statistics.channel_max / factor).amax())
    squares = torch.empty_like(sample)
    for rows in cached_rows(sample):
        x = sample[rows] / factor
        scale = scale_of(x.abs().amax(dim=1, keepdim=True)) if per_row else whole
        torch.square(round_to_grid(x, scale).mul_(scale).sub_(x), out=squares[rows])
    return weight @ squares


class StaticNoise:
    """Each channel's mean squared error as a function of its grid step, clipping at 127 steps included.

    Under a static scale c and a smoothing factor s a channel's step is c * s, in units of the channel as it is.
    So one table serves every scale and every factor.
    """

    def __init__(self, statistics: InputStatistics, every: int = COARSE):
        sample, weight = sampled(statistics, every)
        self._full = scale_of(statistics.channel_max)
        self._beyond = beyond(statistics.count) * statistics.channel_max
        self._unseen = UNSEEN / (UNSEEN + statistics.count)
        rows = []
        for step in STEPS:
            scale = self._full * step
            rows.append(weight @ _squared_error(sample, scale))
        self._table = torch.stack(rows).clamp(min=TINY).log()  # (steps, k)

    def __call__(self, step: Tensor) -> Tensor:
        """(..., k) noise for the channels' steps (..., k); geometric means between tabulated ones."""
        position = ((step / self._full).log2() - STEPS[0].log2()) * PER_OCTAVE
        position = position.clamp(0, len(STEPS) - 1.001)
        below = position.long()
        share = position - below
        rows = below.view(-1, below.shape[-1])
        low, high = (self._table.gather(0, index).view_as(share) for index in (rows, rows + 1))
        return (low + share * (high - low)).exp()

    def best_scale(self, factor: Tensor, cost: Tensor) -> tuple[Tensor, float]:
        """The static scale with the least error for inputs divided by `factor` (k,), and that error.

        One more token in n exceeds the largest of n in a channel, so of evenly smoothed channels by the hundred a
        scale that covers what calibration has seen clips one new row in ten. Hence some tokens beyond it count too.

        Args:
            cost: (k,) of a squared error in each channel, before smoothing.
        """
        covering = (self._full / factor).amax()
        scales = covering * torch.tensor(CLIPS)
        steps = scales[:, None] * factor
        unseen = _squared_error(self._beyond, steps)
        errors = (self(steps) * (1 - self._unseen) + unseen * self._unseen) @ cost
        best = int(errors.argmin())
        return scales[best], float(errors[best])


def beyond(count: int) -> float:
    """What other texts bring, over a channel's largest value in `count` tokens: the best of what was tried on 1,024 and
    4,096 tokens (1.4) and on 16,384 (1.25; `experiments/haq_search.md`)."""
    return min(1.4, 1.25 * max(1.0, 16_384 / max(count, 1)) ** (1 / 12))


def _squared_error(x: Tensor, scale: Tensor) -> Tensor:
    return round_to_grid(x, scale).mul_(scale).sub_(x).square_()


def solved_weight_error(scale: Tensor, cost: Tensor, conditional_variance: Tensor) -> float:
    """What GPTQ leaves of the sum over rows of cost * dw H dw^T.

    Uniform rounding noise in each column, of variance scale^2 / 12, at the price that the column has once later ones
    make up for it. Within 10 % of the measured error (`tests`).

    Args:
        scale: (n,) row scales.
        cost: (n,) of a squared error in each output.
        conditional_variance: (k,) from `solver.Factor`; smoothing by s divides it by s^2.
    """
    return float(cost @ scale.square() / 12 * conditional_variance.sum())


def sampled(statistics: InputStatistics, every: int = 1) -> tuple[Tensor, Tensor]:
    """Every so many sampled rows (r, k), and the share of tokens (r,) that each stands for."""
    assert statistics.sample is not None
    assert statistics.sample_weight is not None
    weight = statistics.sample_weight[::every]
    return statistics.sample[::every], weight / weight.sum()
