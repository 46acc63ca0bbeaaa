"""Refine the smoothing factor of each channel by gradient descent, starting from the best factor of the grid.

With dynamic activation scales, the predicted error is a sum of two products of sums and maxima of monomials in the
factors. So it is convex in their logarithms:

    J(s) = [mean_t max_j (x_tj / s_j)^2] [sum_j c_j s_j^2] + [sum_i b_i max_j (w_ij s_j)^2] [sum_j v_j / s_j^2]

Both terms are divided by 12 steps squared. c and b are the costs of an error of an input and of an output. v are the
conditional variances. The maxima come from a sample of tokens and differ for unseen tokens, so the descent is pulled
towards its start.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from haq_lab.calibration.statistics import Sensitivity
from haq_lab.quantizers.smoothing import ChannelMap

STEPS = 60
RATE = 0.05
PULL = 0.01
MEAN_DECAY, SQUARE_DECAY = 0.8, 0.95  # of Adam (arXiv 1412.6980); shorter than usual, because there are few steps


@dataclass(frozen=True)
class DynamicError:
    """The predicted error J(s), with its gradient in log s.

    Attributes:
        inputs: (r, k) magnitudes of sampled rows, divided by 127.
        share: (r,) share of all tokens that each row represents.
        weight: (n, k) magnitudes of the weights, divided by their largest level.
        cost: Cost of errors of inputs and outputs.
        variance: (k,) conditional variances of the inputs.
    """

    inputs: Tensor
    share: Tensor
    weight: Tensor
    cost: Sensitivity
    variance: Tensor

    @cached_property
    def _input_buffer(self) -> Tensor:
        return torch.empty_like(self.inputs)

    @cached_property
    def _weight_buffer(self) -> Tensor:
        return torch.empty_like(self.weight)

    def __call__(self, factor: Tensor) -> tuple[float, Tensor]:
        """Return J and its gradient dJ / d log s (k,) at the factor (k,)."""
        square = factor.square()
        input_max, input_at = _largest(self.inputs, 1 / factor, self._input_buffer)
        weight_max, weight_at = _largest(self.weight, factor, self._weight_buffer)
        input_steps = self.share * input_max.square() / 12
        weight_steps = self.cost.outputs * weight_max.square() / 12
        costs, variances = self.cost.channels * square, self.variance / square
        noise, rounding = input_steps.sum() * costs.sum(), weight_steps.sum() * variances.sum()
        gradient = input_steps.sum() * costs - weight_steps.sum() * variances
        gradient = gradient.index_add(0, input_at, -input_steps * costs.sum())
        gradient = gradient.index_add(0, weight_at, weight_steps * variances.sum())
        return float(noise + rounding), 2 * gradient


def _largest(rows: Tensor, factor: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value of each row of rows (r, k) * factor (k,), and its column: (r,) both.

    numpy's argmax is several times as fast as torch's `max` over a dimension. `buffer` (r, k) takes the products.
    """
    torch.mul(rows, factor, out=buffer)
    at = torch.from_numpy(buffer.numpy().argmax(axis=1))
    return buffer.gather(1, at[:, None])[:, 0], at


def refine(factor: Tensor, error: DynamicError, channels: ChannelMap) -> Tensor:
    """Minimise the predicted error by gradient descent.

    Args:
        factor: (k,) where the descent starts.
        error: The predicted error.
        channels: Channels that share a row of the source keep a common factor.

    Returns:
        The factor (k,) with the smallest error on the way.
    """
    start = factor.log()
    best, best_error = factor, float("inf")
    log_factor, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, STEPS + 1):
        value, gradient = error(log_factor.exp())
        if value < best_error:
            best, best_error = log_factor.exp(), value
        gradient = channels.shared_sum(gradient) / max(value, 1e-30) + PULL * (log_factor - start)
        mean = MEAN_DECAY * mean + (1 - MEAN_DECAY) * gradient
        square = SQUARE_DECAY * square + (1 - SQUARE_DECAY) * gradient.square()
        unbiased = mean / (1 - MEAN_DECAY**step), square / (1 - SQUARE_DECAY**step)
        log_factor = log_factor - RATE * (1 - step / STEPS) * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return best
