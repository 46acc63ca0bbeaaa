"""Smoothing (SmoothQuant, arXiv 2211.10438): move an activation's outliers into the weights, exactly.

A factor s, one entry a channel, divides the source's outputs and multiplies the consumers' columns. The model
computes what it did before; only the ranges have moved.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.models.architectures import Group

FLOOR = 1e-5  # keeps a dead channel or a zero column from giving a factor of zero


def factor_of(activation_max: Tensor, weight_max: Tensor, strength: float) -> Tensor:
    """s_j = max|X_j|^a / max|W_j|^(1-a), for the strength a in [0, 1]; all (k,)."""
    return (activation_max.clamp(min=FLOOR) ** strength / weight_max.clamp(min=FLOOR) ** (1 - strength)).clamp(
        min=FLOOR
    )


class Channels:
    """How the channels that consumers read map to the rows of the source that writes them.

    One to one, except through attention with grouped-query heads: there one row of `v_proj` serves all the
    query heads of its key-value head, so their channels must share one factor.
    """

    def __init__(self, group: Group, layer: nn.Module, channels: int):
        self.rows = torch.arange(channels)
        if group.kind == "value" and group.source is not None:
            attention: Any = layer.get_submodule(group.source.rpartition(".")[0])
            head: int = attention.head_dim
            repeats = channels // len(_weight(layer, group.source))
            self.rows = self.rows // head // repeats * head + self.rows % head
        self.source_rows = int(self.rows.max()) + 1

    def shared_max(self, values: Tensor) -> Tensor:
        """Each channel's value replaced by the largest among the channels that share its row."""
        top = torch.zeros(self.source_rows).scatter_reduce_(0, self.rows, values, "amax", include_self=False)
        return top[self.rows]

    def shared_sum(self, values: Tensor) -> Tensor:
        """Each channel's value replaced by the sum over the channels that share its row."""
        return torch.zeros(self.source_rows).index_add_(0, self.rows, values)[self.rows]

    def per_row(self, values: Tensor) -> Tensor:
        """A value per channel -> a value per row of the source, for values equal within a row."""
        out = torch.empty(self.source_rows)
        out[self.rows] = values
        return out


def fold(layers: list[nn.Module], group: Group, factor: Tensor, channels: Channels) -> None:
    """Divide the source of `group` by `factor` (k,) and multiply its readers' columns by it, in place.

    A source that is an int8 linear by now takes the division in its row scales: exact, as every row has one.

    Args:
        layers: States of one layer (as smoothed, as quantised), which may share tensors: each is scaled once.
    """
    assert group.source is not None, "a group without a source cannot be smoothed"
    rows = channels.per_row(factor)
    assert torch.equal(rows[channels.rows], factor), "channels that share a row of the source need one factor"
    sources = [layer.get_submodule(group.source) for layer in layers]
    for source in _distinct([getattr(source, "weight_scale", source.weight) for source in sources]):
        source.div_(rows if source.dim() == 1 else rows[:, None])
    for bias in _distinct([getattr(source, "bias", None) for source in sources]):
        bias.div_(rows)
    for weight in _distinct([_weight(layer, name) for layer in layers for name in group.readers]):
        weight.mul_(factor)


def stacked(layer: nn.Module, names: tuple[str, ...]) -> Tensor:
    """The weights of some linears with one input on top of each other: (sum of n, k)."""
    return torch.cat([_weight(layer, name) for name in names])


def _distinct(tensors: list[Any]) -> list[Tensor]:
    """The tensors that are there, each once."""
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor is not None}.values())


def _weight(layer: nn.Module, name: str) -> Tensor:
    return cast(Tensor, layer.get_submodule(name).weight)
