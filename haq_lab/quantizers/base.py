"""The base class of all quantizers.

A quantizer makes three decisions: how to smooth an input, how to round weights, and how to quantise activations. The
baselines override few of them, HAQ overrides all three. `quantizer._target_=my_module.MyQuantizer` uses your own class.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.int8.numerics import ActivationScheme, scale_of
from haq_lab.int8.rotation import NO_ROTATION, block_size
from haq_lab.int8.weight_format import INT8, WeightFormat
from haq_lab.models.families.family import Family, Group
from haq_lab.quantizers.bit_allocation import Bits
from haq_lab.quantizers.grid import round_to_nearest, weight_scale
from haq_lab.quantizers.smoothing import ChannelMap
from haq_lab.utils.errors import UserError

NO_PREFIX, AUTO_PREFIX = "none", "auto"
COLUMNS = 128  # columns of a Hessian that are multiplied at once


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class Smoothing:
    """How to smooth the input of a group of linears.

    Attributes:
        factor: (k,) the smoothing factor of each channel.
        strength: The smoothing strength that gave the factor; None for a factor in closed form.
    """

    factor: Tensor
    strength: float | None = None


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class ActivationChoice:
    """How to quantise one input.

    Attributes:
        scheme: The activation scheme.
        scale: The scale, a scalar tensor, if the activation scheme is static.
    """

    scheme: ActivationScheme
    scale: Tensor | None = None


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class Solution:
    """Rounded weights.

    Attributes:
        levels: (n, k) int8.
        scale: (n,) one scale a row, or (groups, n).
        notes: Facts about the rounding for the per-layer table.
        format: Bits of the levels, and columns that share a scale.
    """

    levels: Tensor
    scale: Tensor
    notes: dict[str, Any] = field(default_factory=dict)
    format: WeightFormat = INT8

    def rows(self, rows: slice) -> Solution:
        """Return a copy of some rows, for one of several linears that were solved together."""
        return Solution(
            self.levels[rows].clone(), self.scale[..., rows].contiguous().clone(), dict(self.notes), self.format
        )


def _check_prefix(value: Any) -> Any:
    """Return a valid `prefix`, with typed `\\n` and `\\t` as a newline and a tab."""
    if value is None:
        return NO_PREFIX
    if isinstance(value, str) and value:
        return value.replace("\\n", "\n").replace("\\t", "\t")
    if isinstance(value, list | tuple) and value and all(type(token) is int for token in value):
        return tuple(value)
    raise ValueError("Write none, auto, a text that is not empty, or a list of token ids such as [198]")


@dataclass(frozen=True)
class Quantizer:
    """Round weights to nearest, use a fixed activation scheme, and do not smooth.

    Derive your own quantizer from this class and override what differs.

    Args:
        activations: Activation scheme: `token` (dynamic, one scale a token), `tensor` (dynamic, one scale for all
            tokens of a sequence that the linear receives) or `static` (a scale from calibration).
        weight_bits: 8, or 4 (levels in [-7, 7], stored two to a byte).
        group: Consecutive columns of a 4-bit weight that share a scale: 128, 64 or 32. `none` means one scale a row.
        lm_head: Whether to quantise the LM head too. Whatever the other settings are, it gets 8 bits, rounding to
            nearest and token-dynamic activations, because calibration does not reach it.
        prefix: Tokens before every sequence (`haq_lab.prefix`): `none`, a text, token ids, or `auto`, which looks for
            those that lower the predicted error most.
        rotation: Hadamard rotation of each linear's input before it is quantised (QuaRot, arXiv 2404.00456): `none`,
            `block` (blocks of at most `rotation_block` channels), or `full` (the largest blocks that fit).
        rotation_block: Largest block of `rotation=block`. A linear uses the largest power of two that divides its
            width, up to this number.

    Example:
        >>> RTN(activations="token", weight_bits=8)  # doctest: +SKIP
    """

    activations: Literal["token", "tensor", "static"] = "token"
    weight_bits: Literal[8, 4] = 8
    group: Literal[128, 64, 32, "none"] = "none"
    lm_head: bool = False
    prefix: Annotated[str | tuple[int, ...], BeforeValidator(_check_prefix)] = NO_PREFIX
    rotation: Literal["none", "block", "full"] = "none"
    rotation_block: Annotated[int, Field(ge=2)] = 128

    def __post_init__(self) -> None:
        if self.group != "none" and self.weight_bits == 8:
            raise UserError(
                f"quantizer.group: {self.group} needs 4-bit weights, but quantizer.weight_bits is 8. "
                "Choose quantizer.weight_bits=4 or quantizer.group=none."
            )

    @property
    def weight_format(self) -> WeightFormat:
        """The format of the weights that `solve` returns."""
        return WeightFormat(self.weight_bits, None if self.group == "none" else self.group)

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a quantised weight with its share of a group's scale."""
        scale = 0.0 if self.weight_format.group is None else 4 / self.weight_format.group
        return (self.average_bits or self.weight_format.bits) / 8 + scale

    @property
    def average_bits(self) -> float | None:
        """The largest average number of bits of a weight, if the bits of each linear are to be chosen; else None."""
        return None

    def with_bits(self, bits: Bits) -> Quantizer:
        """Return this quantizer for linears whose bits have been chosen. 8-bit weights have one scale a row."""
        return replace(self, weight_bits=bits, group=self.group if bits == 4 else "none")

    def weight_error(self, weight: Tensor, statistics: InputStatistics, cost: Tensor) -> float:
        """Predict the KL divergence, in nats a token, that rounding the weights of some linears adds.

        Args:
            weight: (n, k) stacked weights, after smoothing.
            statistics: Statistics of the smoothed input.
            cost: (n,) sensitivity of each output.
        """
        raise NotImplementedError

    @property
    def needs(self) -> Needs:
        """The calibration statistics that this quantizer needs."""
        static = self.activations == "static"
        return Needs(inputs=static, sample=static and self.rotation != "none")

    def rotation_of(self, channels: int) -> int:
        """Return the block of the rotation of an input with this many channels; 1 for no rotation."""
        if self.rotation == "none":
            return NO_ROTATION
        return block_size(channels, self.rotation_block if self.rotation == "block" else None)

    def smoothing(
        self,
        group: Group,
        family: Family,
        weight: Tensor,
        statistics: InputStatistics | None,
        channels: ChannelMap,
    ) -> Smoothing | None:
        """Choose how to smooth the input of a group.

        Args:
            group: The linears that read the input, and the module that smoothing is folded into.
            family: The model's architecture.
            weight: (n, k) stacked weights of all readers. A router's rows come last, because its columns are multiplied
                by the factor too, as in SmoothQuant's code.
            statistics: Statistics of the input, or None if the quantizer needs none.
            channels: Maps the input's channels to rows of the source.

        Returns:
            The smoothing factor, or None for no smoothing.
        """
        return None

    @property
    def smooths(self) -> bool:
        """Whether it chooses smoothing factors. If not, the smoothed model is the original one."""
        return type(self).smoothing is not Quantizer.smoothing

    def activation(self, weight: Tensor, statistics: InputStatistics | None) -> ActivationChoice:
        """Choose how to quantise the input of a group.

        Args:
            weight: (n, k) stacked weights of the group's linears, after smoothing and rotation.
            statistics: Statistics of the smoothed and rotated input, or None if the quantizer needs none.

        Returns:
            The activation scheme. A static scale covers the largest calibrated value.
        """
        if self.activations != "static":
            return ActivationChoice(self.activations)
        assert statistics is not None
        return ActivationChoice("static", scale_of(statistics.channel_max.amax()))

    def solve(self, weight: Tensor, statistics: InputStatistics | None, activation: ActivationChoice) -> Solution:
        """Round the weights of linears that share an input.

        Args:
            weight: (n, k) stacked weights, after smoothing and rotation.
            statistics: Statistics of the smoothed and rotated input, or None if the quantizer needs none.
            activation: How the input is quantised.

        Returns:
            Levels (n, k) and scales, (n,) or (groups, n).
        """
        return nearest_solution(weight, self.weight_format)

    def _fallback(self, weight: Tensor) -> Solution:
        """Round to nearest and note it, if the Hessian cannot be factorized."""
        return replace(nearest_solution(weight, self.weight_format), notes={"fallback": "rtn"})


def nearest_solution(weight: Tensor, format: WeightFormat) -> Solution:
    """Round a weight (n, k) to nearest, with scales that cover the largest weight of each row or group."""
    scale = weight_scale(weight, format)
    return Solution(round_to_nearest(weight, scale, format.bits, format.group), scale, format=format)


def output_error(weight: Tensor, solution: Solution, hessian: Tensor) -> float:
    """Return the mean squared output error that rounding the weights causes: tr(dW H dW^T) / n.

    The arguments are those of `output_errors`.
    """
    return float(output_errors(weight, solution, hessian).mean())


def output_errors(weight: Tensor, solution: Solution, hessian: Tensor) -> Tensor:
    """Return the mean squared error of each output that rounding the weights causes: diag(dW H dW^T), (n,) float64.

    Args:
        weight: (n, k) before rounding.
        solution: The weights as rounded.
        hessian: (k, k) mean of x x^T.
    """
    difference = solution.levels.float() * solution.format.row_scales(solution.scale, weight.shape[1]) - weight
    total = torch.zeros(len(weight), dtype=torch.float64)
    for first in range(0, len(hessian), COLUMNS):  # H is symmetric, so blocks left of its diagonal count twice
        columns = slice(first, first + COLUMNS)
        block = difference[:, columns]
        product = block @ hessian[columns, columns]
        product.addmm_(difference[:, :first], hessian[:first, columns], alpha=2)
        total += product.mul_(block).sum(dim=1)
    return total
