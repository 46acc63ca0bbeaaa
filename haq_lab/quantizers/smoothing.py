"""Smooth activations: move their outliers into the weights (SmoothQuant, arXiv 2211.10438).

A factor s has one entry a channel. It divides the outputs of the source, such as a norm, and multiplies the columns of
the linears that read them. The model's output does not change.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.models.families.family import Group
from haq_lab.prefix.attention import prefix_values

FLOOR = 1e-5  # avoids a factor of 0 for a dead channel or a column of zeros


def smoothing_factor(activation_max: Tensor, weight_max: Tensor, strength: float) -> Tensor:
    """Return the factor s_j = max|X_j|^a / max|W_j|^(1-a) (k,) for the strength a in [0, 1] (SmoothQuant, eq. 4)."""
    return (activation_max.clamp(min=FLOOR) ** strength / weight_max.clamp(min=FLOOR) ** (1 - strength)).clamp(
        min=FLOOR
    )


class ChannelMap:
    """Maps the channels that linears read to the rows of the source that writes them.

    The map is one to one, except for attention with grouped-query heads. There one row of `v_proj` serves all query
    heads of its key-value head, so their channels must share one factor.

    Attributes:
        rows: (k,) for each channel, its row among those of the source that compute the input.
        source_rows: Number of these rows.
        first: Index of the first of them. It is not 0 if the source is a fused projection.
    """

    def __init__(self, group: Group, layer: nn.Module, channels: int):
        self.rows = torch.arange(channels)
        source: Any = None if group.source is None else layer.get_submodule(group.source)
        if group.kind == "value" and group.source is not None:
            attention: Any = layer.get_submodule(group.source.rpartition(".")[0])
            # In latent attention, a head of the source has some rows of keys, then those of its values.
            keys = getattr(attention, "qk_nope_head_dim", 0)
            head: int = attention.v_head_dim if keys else attention.head_dim
            # A fused projection has a row of queries for each channel, and as many rows of keys as of values.
            values = (source.out_features - channels) // 2 if group.fused else source.out_features
            repeats = 1 if keys else channels // values
            self.rows = self.rows // head // repeats * (keys + head) + keys + self.rows % head
        self.source_rows = int(self.rows.max()) + 1
        self.first = source.out_features - self.source_rows if group.fused else 0

    def shared_max(self, values: Tensor) -> Tensor:
        """Replace each channel's value by the largest value of the channels that share its row."""
        top = torch.zeros(self.source_rows).scatter_reduce_(0, self.rows, values, "amax", include_self=False)
        return top[self.rows]

    def shared_sum(self, values: Tensor) -> Tensor:
        """Replace each channel's value by the sum over the channels that share its row."""
        return torch.zeros(self.source_rows).index_add_(0, self.rows, values)[self.rows]

    def per_row(self, values: Tensor) -> Tensor:
        """Return one value per row of the source, 1 for rows that no channel reads.

        Channels that share a row must have equal values.
        """
        out = torch.ones(self.source_rows)
        out[self.rows] = values
        return out


def fold(layers: list[nn.Module], group: Group, factor: Tensor, channels: ChannelMap) -> None:
    """Divide the source of a group by the factor and multiply the columns of its readers by it, in place.

    A source that is already an int8 linear is divided through its weight scales. This is exact, because no rows share a
    scale. The values of a prefix are outputs of the value projection, so they are divided with it.

    Args:
        layers: The same layer in several states (as smoothed, as quantised). A tensor that they share is scaled once.
        group: The source and its readers.
        factor: (k,) positive.
        channels: Maps channels to rows of the source.
    """
    assert group.source is not None, "a group without a source cannot be smoothed"
    rows = channels.per_row(factor)
    assert torch.equal(rows[channels.rows], factor), "channels that share a row of the source must have one factor"
    sources, first = [layer.get_submodule(group.source) for layer in layers], channels.first
    for scale in _distinct([getattr(source, "weight_scale", None) for source in sources]):
        scale[..., first:].div_(rows)
    for weight in _distinct([None if hasattr(source, "weight_scale") else source.weight for source in sources]):
        own = weight[first:].add_(group.gain_offset)
        own.div_(rows if weight.dim() == 1 else rows[:, None]).sub_(group.gain_offset)
    for bias in _distinct([getattr(source, "bias", None) for source in sources]):
        bias[first:].div_(rows)
    if group.kind == "value":
        attention = group.source.rpartition(".")[0]
        for values in _distinct([prefix_values(layer.get_submodule(attention)) for layer in layers]):
            values.div_(rows.view(values.shape[1], 1, values.shape[3]))
    for weight in _distinct([_weight(layer, name) for layer in layers for name in group.readers]):
        weight.mul_(factor)


def stack_weights(layer: nn.Module, names: tuple[str, ...]) -> Tensor:
    """Concatenate the weights of linears that share an input: (sum of n, k)."""
    return torch.cat([_weight(layer, name) for name in names])


def _distinct(tensors: list[Any]) -> list[Tensor]:
    """Drop None and repeated tensors."""
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor is not None}.values())


def _weight(layer: nn.Module, name: str) -> Tensor:
    return cast(Tensor, layer.get_submodule(name).weight)
