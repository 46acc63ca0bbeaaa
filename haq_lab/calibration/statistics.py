"""Gather the statistics of one input over the calibration tokens. Linears that share the input share them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from haq_lab.int8.rotation import NO_ROTATION, hadamard, rotate

SAMPLE_ROWS = 2048  # evenly spaced tokens whose inputs are stored
EXTREME_ROWS = 64  # stored besides: the tokens with the largest values, which are the outliers
MIN_TOKENS = 64  # an expert with fewer tokens uses the statistics of the layer
COLUMNS = 256  # columns of a Hessian that are computed at once, and only up to its diagonal
STAND_IN_WEIGHT = 0.1  # weight of a token in the statistics of an expert that it was not routed to


@dataclass(frozen=True)
class Needs:
    """The calibration statistics that a quantizer needs. Others are not computed.

    Attributes:
        inputs: Whether it needs statistics at all.
        hessian: Whether it needs the Hessian of each input.
        cross: Whether it needs the cross moment with the full-precision model's input.
        sample: Whether it needs sampled rows of each input.
        sensitivity: Number of calibration windows on which to measure the sensitivity; 0 for none.
    """

    inputs: bool = False
    hessian: bool = False
    cross: bool = False
    sample: bool = False
    sensitivity: int = 0


@dataclass(frozen=True)
class Sensitivity:
    """How much an error of one group of linears changes the model's predictions (`haq_lab.calibration.sensitivity`).

    The unit is twice the KL divergence in nats a token, for each unit of squared error.

    Attributes:
        channels: (k,) for errors of the input channels.
        outputs: (n,) for errors of the stacked outputs.
    """

    channels: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class CalibrationPolicy:
    """How statistics are gathered.

    Args:
        inputs: Model whose hidden states are used: the full-precision model (`fp`), or the model as quantised so far
            (`quantized`).
        route: Tokens that calibrate an expert's gate and up projections: those routed to it (`topk`), or `all`.
        min_tokens: An expert with fewer tokens uses the statistics of the whole layer.
    """

    inputs: Literal["fp", "quantized"] = "quantized"
    route: Literal["topk", "all"] = "topk"
    min_tokens: int = MIN_TOKENS


@dataclass
class InputStatistics:
    """Moments and ranges of an input with k channels.

    Attributes:
        count: Number of tokens.
        channel_max: (k,) largest |x| of each channel.
        hessian: (k, k) mean of x x^T. It is GPTQ's H up to a factor that does not change the solution.
        cross: (k, k) mean of (x_fp - x) x^T, where x_fp is the input in the full-precision model and x the input in the
            quantised model (GPTAQ, arXiv 2504.02692, eq. 9).
        sample: (r, k) inputs of sampled tokens.
        sample_weight: (r,) number of tokens that each sampled row represents.
        routed: By expert, the statistics of the tokens routed to it. Empty if experts have no statistics of their own.
        stands_in: Whether the statistics include tokens of the layer because too few were routed to the expert.
        sensitivity: Sensitivity of the linears that read the input.
        share: For an expert, its share of the layer's (token, expert) pairs; otherwise 1.
    """

    count: int
    channel_max: Tensor
    hessian: Tensor | None = None
    cross: Tensor | None = None
    sample: Tensor | None = None
    sample_weight: Tensor | None = None
    routed: dict[int, InputStatistics] = field(default_factory=dict)
    stands_in: bool = False
    sensitivity: Sensitivity | None = None
    share: float = 1.0

    def of(self, expert: int | None) -> InputStatistics:
        """Return the statistics of an expert if it has its own, otherwise these."""
        return self if expert is None else self.routed.get(expert, self)

    def shrunk_hessian(self) -> Tensor:
        """Return the Hessian with its off-diagonal part multiplied by n / (n + k), for n tokens and k channels.

        A Hessian from few tokens overfits to them. Below about 2 k tokens, weights that are solved with it are worse
        than weights rounded to nearest. Shrinkage towards the diagonal (as for covariances in Ledoit and Wolf, 2004)
        brings the solution closer to rounding to nearest.
        """
        assert self.hessian is not None
        tokens = self.count * (STAND_IN_WEIGHT if self.stands_in else 1.0)
        hessian = self.hessian * (tokens / (tokens + len(self.hessian)))
        hessian.diagonal().copy_(self.hessian.diagonal())
        return hessian

    def standing_in(self) -> InputStatistics:
        """Return these statistics for an expert that has too few tokens of its own."""
        return replace(self, routed={}, stands_in=True)

    def divided_by(self, factor: Tensor) -> InputStatistics:
        """Return the statistics of x / factor, the input after smoothing with `factor` (k,)."""
        outer = factor[:, None] * factor

        def divide(moment: Tensor | None, by: Tensor) -> Tensor | None:
            return None if moment is None else moment / by

        return InputStatistics(
            self.count,
            self.channel_max / factor,
            divide(self.hessian, outer),
            divide(self.cross, outer),
            divide(self.sample, factor),
            self.sample_weight,
            {expert: statistics.divided_by(factor) for expert, statistics in self.routed.items()},
            self.stands_in,
            self.sensitivity and replace(self.sensitivity, channels=self.sensitivity.channels * factor.square()),
            self.share,
        )

    def rotated(self, block: int) -> InputStatistics:
        """Return the statistics of x R, the input after a rotation (`haq_lab.int8.rotation`).

        The moments and the sample follow exactly: H' = R^T H R. The largest values are those of the sample. Without a
        sample they are upper bounds, because the largest values of the channels do not determine them. The sensitivity
        is that of a diagonal Fisher matrix: every channel of a block gets the mean of the block.

        Args:
            block: Block of the rotation. The result is `self` if it is 1.
        """
        if block == NO_ROTATION:
            return self

        matrix = hadamard(block)

        def both_sides(moment: Tensor | None) -> Tensor | None:
            if moment is None:
                return None
            left = torch.matmul(matrix, moment.view(-1, block, moment.shape[1]))
            return torch.matmul(left.view(-1, block), matrix).view(moment.shape)

        sample = None if self.sample is None else rotate(self.sample, block)

        def mean_of_block(values: Tensor) -> Tensor:
            return values.view(-1, block).mean(dim=1).repeat_interleave(block)

        bounds = mean_of_block(self.channel_max) * block**0.5
        sensitivity = self.sensitivity
        if sensitivity is not None:
            sensitivity = replace(sensitivity, channels=mean_of_block(sensitivity.channels))
        return replace(
            self,
            channel_max=bounds if sample is None else sample.abs().amax(dim=0),
            hessian=both_sides(self.hessian),
            cross=both_sides(self.cross),
            sample=sample,
            routed={expert: statistics.rotated(block) for expert, statistics in self.routed.items()},
            sensitivity=sensitivity,
        )


class Accumulator:
    """Computes `InputStatistics` from batches.

    Args:
        channels: Number of channels k.
        total: Largest number of tokens in all batches.
        needs: The statistics to compute.
    """

    def __init__(self, channels: int, total: int, needs: Needs):
        self.needs = needs
        self.count = 0
        self.channel_max = torch.zeros(channels)
        self.hessian = torch.zeros(channels, channels) if needs.hessian else None
        self.cross = torch.zeros(channels, channels) if needs.cross else None
        self._stride = max(1, total // SAMPLE_ROWS)
        self._even = [torch.empty(0, channels)]
        self._extreme = torch.empty(0, channels)

    def add(self, x: Tensor, x_fp: Tensor | None) -> None:
        """Add one batch.

        Args:
            x: (m, k) rows of the input.
            x_fp: (m, k) the same rows in the full-precision model, for `needs.cross`.
        """
        x = x.reshape(-1, x.shape[-1]).float()
        self.channel_max = torch.maximum(self.channel_max, x.abs().amax(dim=0)) if len(x) else self.channel_max
        if self.hessian is not None:
            for first in range(0, x.shape[1], COLUMNS):  # it is symmetric, so `finish` fills in the other half
                end = first + COLUMNS
                self.hessian[first:end, :end].addmm_(x[:, first:end].t(), x[:, :end])
        if self.cross is not None and x_fp is not None:
            self.cross.addmm_((x_fp.reshape(x.shape) - x).t(), x)
        if self.needs.sample:
            first = -self.count % self._stride
            self._even.append(x[first :: self._stride].clone())
            candidates = torch.cat([self._extreme, x])
            top = candidates.abs().amax(dim=1).topk(min(EXTREME_ROWS, len(candidates))).indices
            self._extreme = candidates[top]
        self.count += len(x)

    def finish(self) -> InputStatistics:
        """Return the statistics of all batches."""
        count = max(self.count, 1)
        hessian = None if self.hessian is None else self.hessian / count
        if hessian is not None:
            for first in range(COLUMNS, len(hessian), COLUMNS):
                hessian[:first, first : first + COLUMNS] = hessian[first : first + COLUMNS, :first].t()
        sample = weight = None
        if self.needs.sample:
            even = torch.cat(self._even)
            sample = torch.cat([even, self._extreme])
            # An extreme row represents itself only, and the evenly spaced rows represent all other tokens.
            weight = torch.ones(len(sample))
            weight[: len(even)] = (self.count - len(self._extreme)) / max(len(even), 1)
        return InputStatistics(
            self.count,
            self.channel_max,
            hessian,
            None if self.cross is None else self.cross / count,
            sample,
            weight,
        )
