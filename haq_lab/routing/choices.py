"""Collect the router's choices in one pass over the calibration windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from haq_lab.routing.trace import Trace, expert_dtype

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Routing:
    """The router's choices in one pass, layer by layer.

    Attributes:
        experts: Number of experts in a layer.
        layers: Indices of the layers with experts.
        windows: Shape (n, t) of the token windows.
        chosen: (n * t, k) chosen experts of each of these layers so far, the largest weight first. Their type is
            `dtype`.
        weights: (n * t, k) float16 gate weights of each of these layers so far.
    """

    experts: int
    layers: tuple[int, ...]
    windows: tuple[int, int]
    chosen: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The type of expert indices, uint8 or uint16."""
        return torch.from_numpy(np.empty(0, expert_dtype(self.experts))).dtype

    def add_layer(self, chosen: Tensor, weights: Tensor) -> None:
        """Add the choices of the next layer with experts.

        Args:
            chosen: (n * t, k) chosen experts.
            weights: (n * t, k) their gate weights.
        """
        chosen, weights = by_weight(chosen, weights)
        self.chosen.append(chosen.to(self.dtype))
        self.weights.append(weights.to(torch.float16))

    def counts(self, layer: int) -> Tensor:
        """Return the number of tokens of each expert in a layer, (experts,)."""
        return self.chosen[self.layers.index(layer)].flatten().long().bincount(minlength=self.experts)

    def table(self) -> pd.DataFrame:
        """Return a row for each layer and expert.

        Returns:
            A table with the columns `layer`, `expert`, `tokens`, `share` (of the layer's choices) and `gate_weight`
            (mean).
        """
        import pandas as pd  # loading a checkpoint does not need it

        rows = []
        for layer, chosen, weights in zip(self.layers, self.chosen, self.weights, strict=True):
            counts = self.counts(layer)
            sums = torch.zeros(self.experts).index_add_(0, chosen.flatten().long(), weights.flatten().float())
            for expert, count in enumerate(counts.tolist()):
                share, mean = count / max(chosen.numel(), 1), float(sums[expert]) / max(count, 1)
                rows.append({"layer": layer, "expert": expert, "tokens": count, "share": share, "gate_weight": mean})
        return pd.DataFrame(rows)

    def trace(self, model: str, text: str, prompt: int | None = None) -> Trace:
        """Return the choices as a routing trace.

        Args:
            model: Name of the model.
            text: Name of the text.
            prompt: Number of tokens of each window that count as its prompt. The others count as decoded. None means
                all of them.
        """
        count, length = self.windows
        decoded = np.arange(length) >= (length if prompt is None else prompt)
        return Trace(
            torch.stack(self.chosen, dim=1).numpy(),
            torch.stack(self.weights, dim=1).numpy(),
            np.tile(decoded, count),
            np.arange(count) * length,
            self.experts,
            model,
            text,
        )


def by_weight(chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each token's choices by falling gate weight. Some routers return them in another order.

    Args:
        chosen: (t, k) chosen experts.
        weights: (t, k) their gate weights.
    """
    order = weights.argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order), weights.gather(1, order)
