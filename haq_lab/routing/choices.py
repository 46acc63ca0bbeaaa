"""Which experts the calibration tokens were sent to: the trace that offloading is planned from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from haq_lab.routing.trace import Trace


@dataclass
class Routing:
    """The router's choices over one pass, a layer at a time.

    Attributes:
        experts: Experts of a layer.
        windows: (n, t) shape of the token windows.
        chosen: By layer, (n * t, k) uint8 expert numbers, the likeliest first.
        weights: By layer, (n * t, k) float16 gate weights.
    """

    experts: int
    windows: tuple[int, int]
    chosen: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add_layer(self, chosen: Tensor, weights: Tensor) -> None:
        """The next layer's choices, (n * t, k) both."""
        assert self.experts <= 256, "expert numbers are kept in 8 bits"
        self.chosen.append(chosen.to(torch.uint8))
        self.weights.append(weights.to(torch.float16))

    def counts(self, layer: int) -> Tensor:
        """(experts,) tokens that each expert of a layer got."""
        return self.chosen[layer].flatten().long().bincount(minlength=self.experts)

    def table(self) -> pd.DataFrame:
        """A row for each layer and expert: tokens, their share of the layer's, mean gate weight."""
        rows = []
        for layer, (chosen, weights) in enumerate(zip(self.chosen, self.weights, strict=True)):
            counts = self.counts(layer)
            mass = torch.zeros(self.experts).index_add_(0, chosen.flatten().long(), weights.flatten().float())
            for expert, count in enumerate(counts.tolist()):
                share, mean = count / max(chosen.numel(), 1), float(mass[expert]) / max(count, 1)
                rows.append({"layer": layer, "expert": expert, "tokens": count, "share": share, "gate_weight": mean})
        return pd.DataFrame(rows)

    def trace(self, model: str, text: str) -> Trace:
        """As a routing trace: every window a prompt of its own."""
        count, length = self.windows
        return Trace(
            torch.stack(self.chosen, dim=1).numpy(),
            torch.stack(self.weights, dim=1).numpy(),
            np.zeros(count * length, np.bool_),
            np.arange(count) * length,
            self.experts,
            model,
            text,
        )
