"""The base class of all quantizers.

A quantizer makes three decisions: how to smooth an input, how to round weights, and how to quantise activations. The
baselines override few of them, HAQ overrides all three. `quantizer._target_=my_module.MyQuantizer` uses your own class.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.int8.numerics import ActivationScheme, scale_of
from haq_lab.int8.rotation import NO_ROTATION, block_size
from haq_lab.models.architectures import Family, Group
from haq_lab.quantizers.grid import round_to_nearest, row_scale
from haq_lab.quantizers.smoothing import ChannelMap

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
        scale: (n,) one scale a row.
        notes: Facts about the rounding for the per-layer table.
    """

    levels: Tensor
    scale: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


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
        weight_bits: 8, or 4 (levels in [-7, 7], stored as int8).
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
    lm_head: bool = False
    prefix: Annotated[str | tuple[int, ...], BeforeValidator(_check_prefix)] = NO_PREFIX
    rotation: Literal["none", "block", "full"] = "none"
    rotation_block: Annotated[int, Field(ge=2)] = 128

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
            Levels (n, k) and scales (n,).
        """
        scale = row_scale(weight, self.weight_bits)
        return Solution(round_to_nearest(weight, scale, self.weight_bits), scale)

    def _fallback(self, weight: Tensor) -> Solution:
        """Round to nearest and note it, if the Hessian cannot be factorized."""
        nearest = Quantizer.solve(self, weight, None, ActivationChoice("token"))
        return Solution(nearest.levels, nearest.scale, {"fallback": "rtn"})


def output_error(weight: Tensor, solution: Solution, hessian: Tensor) -> float:
    """Return the mean squared output error that rounding the weights causes: tr(dW H dW^T) / n.

    Args:
        weight: (n, k) before rounding.
        hessian: (k, k) mean of x x^T.
    """
    difference = solution.levels.float() * solution.scale[:, None] - weight
    total = 0.0
    for first in range(0, len(hessian), COLUMNS):  # H is symmetric, so blocks left of its diagonal count twice
        columns = slice(first, first + COLUMNS)
        block = difference[:, columns]
        product = block @ hessian[columns, columns]
        product.addmm_(difference[:, :first], hessian[:first, columns], alpha=2)
        total += float(torch.einsum("nk,nk->", product, block))
    return total / len(weight)
