"""Statistics of one distinct input (q, k and v share one), gathered over the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

SAMPLE_ROWS = 2048  # tokens kept whole, evenly spaced
EXTREME_ROWS = 64  # and those with the largest entries, where outliers live
MIN_TOKENS = 64
STANDING_IN_WORTH = 0.1  # of a token that the router sent elsewhere, to an expert that it stands in for


@dataclass(frozen=True)
class Needs:
    """What a quantizer asks calibration for; what nobody needs is not computed."""

    inputs: bool = False
    hessian: bool = False
    cross: bool = False
    sample: bool = False
    sensitivity: int = 0  # windows, of those that calibrate


@dataclass(frozen=True)
class Sensitivity:
    """What an error of one group of linears costs the model's predictions: twice the KL divergence, in nats a token,
    for each unit of squared error (`haq_lab.calibration.sensitivity`).

    Attributes:
        channels: (k,) of their input.
        outputs: (n,) of their outputs, stacked.
    """

    channels: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class CalibrationPolicy:
    """How statistics are gathered.

    Args:
        inputs: `fp`: statistics of the full-precision model; `quantized`: of the model as quantised so far.
        route: Which tokens calibrate an expert's gate and up projections: `topk`, those routed to it, or `all`.
        min_tokens: An expert with fewer tokens is calibrated on the layer's.
    """

    inputs: Literal["fp", "quantized"] = "quantized"
    route: Literal["topk", "all"] = "topk"
    min_tokens: int = MIN_TOKENS


@dataclass
class InputStatistics:
    """Moments and ranges of an input of k channels, over `count` tokens.

    Attributes:
        channel_max: (k,) largest |x| of each channel.
        hessian: (k, k) mean of x x^T; GPTQ's H up to a factor that its solution does not depend on.
        cross: (k, k) mean of (x_fp - x) x^T, where x_fp is what the full-precision model has at this point
            and x what the quantised one has (GPTAQ, arXiv 2504.02692, eq. 9).
        sample: (r, k) rows kept whole, and `sample_weight` (r,), how many tokens each stands for.
        routed: By expert, the same of the tokens that are routed to it, where the experts that share this input
            are calibrated apart.
        stands_in: Too few tokens were routed to the expert, so these are of the layer's tokens.
        sensitivity: Of the linears that read it.
        share: Of a layer's inputs like it: an expert's is its part of the pairs (token, expert).
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
        """What the linears of an expert go by: its own statistics where there are any, else these."""
        return self if expert is None else self.routed.get(expert, self)

    def shrunk_hessian(self) -> Tensor:
        """The Hessian with its off-diagonal part shrunk by n / (n + k), for n tokens and k channels.

        A Hessian from few tokens knows directions that nobody else will ever see, and weights solved under it
        are worse than rounded ones as long as n is below 2 k or so. Shrunk towards its diagonal (as Ledoit and
        Wolf, 2004, shrink a covariance), it goes over into plain rounding instead.
        """
        assert self.hessian is not None
        worth = self.count * (STANDING_IN_WORTH if self.stands_in else 1.0)
        hessian = self.hessian * (worth / (worth + len(self.hessian)))
        hessian.diagonal().copy_(self.hessian.diagonal())
        return hessian

    def standing_in(self) -> InputStatistics:
        """These, for an expert that has too few tokens of its own."""
        return replace(self, routed={}, stands_in=True)

    def divided_by(self, factor: Tensor) -> InputStatistics:
        """The statistics of x / factor, factor (k,): what the linear sees after smoothing."""
        outer = factor[:, None] * factor

        def over(moment: Tensor | None, by: Tensor) -> Tensor | None:
            return None if moment is None else moment / by

        return InputStatistics(
            self.count,
            self.channel_max / factor,
            over(self.hessian, outer),
            over(self.cross, outer),
            over(self.sample, factor),
            self.sample_weight,
            {expert: statistics.divided_by(factor) for expert, statistics in self.routed.items()},
            self.stands_in,
            self.sensitivity and replace(self.sensitivity, channels=self.sensitivity.channels * factor.square()),
            self.share,
        )


class Accumulator:
    """Builds `InputStatistics` from batches; `total` is how many tokens will come at most."""

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
        """Rows (m, k) of the input, and the same rows in the full-precision model (for `cross`)."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.channel_max = torch.maximum(self.channel_max, x.abs().amax(dim=0)) if len(x) else self.channel_max
        if self.hessian is not None:
            self.hessian.addmm_(x.t(), x)
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
        """The statistics of all that was added."""
        count = max(self.count, 1)
        sample = weight = None
        if self.needs.sample:
            even = torch.cat(self._even)
            sample = torch.cat([even, self._extreme])
            # An extreme row stands for itself alone, and the even rows for all the rest.
            weight = torch.ones(len(sample))
            weight[: len(even)] = (self.count - len(self._extreme)) / max(len(even), 1)
        return InputStatistics(
            self.count,
            self.channel_max,
            None if self.hessian is None else self.hessian / count,
            None if self.cross is None else self.cross / count,
            sample,
            weight,
        )
