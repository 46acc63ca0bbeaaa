"""Each channel's smoothing factor on its own, from the best of the grid on.

Under dynamic activation scales the predicted error is a sum of two products of sums and maxima of monomials in the
factors, so convex in their logarithms:

    J(s) = [mean_t max_j (x_tj / s_j)^2] [sum_j c_j s_j^2] + [sum_i b_i max_j (w_ij s_j)^2] [sum_j v_j / s_j^2]

(both over 12 steps squared; c and b what an error of an input or output costs, v the conditional variances). A
sample of tokens sets the maxima, and unseen tokens have others: hence the pull towards the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from haq_lab.calibration.statistics import Sensitivity
from haq_lab.quantizers.smoothing import Channels

STEPS = 60
RATE = 0.05
PULL = 0.01
MEAN_DECAY, SQUARE_DECAY = 0.8, 0.95  # Adam's (arXiv 1412.6980): short memories for few steps


@dataclass(frozen=True)
class DynamicError:
    """J(s) with its gradient in log s.

    Attributes:
        inputs: (r, k) magnitudes of sampled rows, over 127; `share` (r,) of the tokens that each stands for.
        weight: (n, k) magnitudes, over the weights' largest level.
        cost: What errors cost.
        variance: (k,) conditional variances of the inputs.
    """

    inputs: Tensor
    share: Tensor
    weight: Tensor
    cost: Sensitivity
    variance: Tensor

    @cached_property
    def _input_room(self) -> Tensor:
        return torch.empty_like(self.inputs)

    @cached_property
    def _weight_room(self) -> Tensor:
        return torch.empty_like(self.weight)

    def __call__(self, factor: Tensor) -> tuple[float, Tensor]:
        """J and dJ / d log s (k,) at the factors (k,)."""
        square = factor.square()
        input_max, input_at = _largest(self.inputs, 1 / factor, self._input_room)
        weight_max, weight_at = _largest(self.weight, factor, self._weight_room)
        input_steps = self.share * input_max.square() / 12
        weight_steps = self.cost.outputs * weight_max.square() / 12
        costs, variances = self.cost.channels * square, self.variance / square
        noise, rounding = input_steps.sum() * costs.sum(), weight_steps.sum() * variances.sum()
        gradient = input_steps.sum() * costs - weight_steps.sum() * variances
        gradient = gradient.index_add(0, input_at, -input_steps * costs.sum())
        gradient = gradient.index_add(0, weight_at, weight_steps * variances.sum())
        return float(noise + rounding), 2 * gradient


def _largest(rows: Tensor, factor: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest of rows * factor, (r, k) by (k,), and where it is: (r,) both. By numpy's argmax, several times
    as fast as torch's `max` over a dimension; `room` (r, k) takes the products."""
    torch.mul(rows, factor, out=room)
    at = torch.from_numpy(room.numpy().argmax(axis=1))
    return room.gather(1, at[:, None])[:, 0], at


def refined(factor: Tensor, error: DynamicError, channels: Channels) -> Tensor:
    """The factor (k,) of least J that descent from `factor` finds; channels that share a row keep one factor."""
    start = factor.log()
    best, least = factor, float("inf")
    place, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, STEPS + 1):
        value, gradient = error(place.exp())
        if value < least:
            best, least = place.exp(), value
        gradient = channels.shared_sum(gradient) / max(value, 1e-30) + PULL * (place - start)
        mean = MEAN_DECAY * mean + (1 - MEAN_DECAY) * gradient
        square = SQUARE_DECAY * square + (1 - SQUARE_DECAY) * gradient.square()
        unbiased = mean / (1 - MEAN_DECAY**step), square / (1 - SQUARE_DECAY**step)
        place = place - RATE * (1 - step / STEPS) * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return best
