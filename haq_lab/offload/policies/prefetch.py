"""Prefetch: which experts the next layer will want, guessed while this one computes.

A wrong guess costs a read and nothing else: guesses land in spare slots that are no part of the cache
(mixtral-offloading, arXiv 2312.17238).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from haq_lab.routing.statistics import transitions
from haq_lab.routing.trace import Trace


class Prefetch(Protocol):
    """Guesses the experts of layer + 1, most wanted first."""

    def guess(self, layer: int, hidden: Tensor | None, chosen: Tensor, k: int) -> list[int]:
        """From what `layer`'s experts receive, (t, d), None in a simulator, and the chosen ones, (t, k) on the CPU."""
        ...


class NextGate:
    """The next layer's router, applied early: hidden states change little from layer to layer."""

    def __init__(self, routers: list[nn.Module]):
        self.routers = routers

    def guess(self, layer: int, hidden: Tensor | None, chosen: Tensor, k: int) -> list[int]:
        assert hidden is not None, "a router needs hidden states; a simulator takes what an engine's guessed"
        _, weights, experts = self.routers[layer + 1](hidden)
        weights, experts = weights.cpu(), experts.cpu()
        wanted = torch.zeros(int(experts.max()) + 1).index_add_(0, experts.flatten(), weights.flatten().float())
        return wanted.argsort(descending=True, stable=True)[: min(k, int((wanted > 0).sum()))].tolist()


class NextOnPath:
    """What tokens of the calibration trace chose after these experts."""

    def __init__(self, profile: Trace):
        counts = transitions(profile)  # (layers - 1, E, E)
        totals = counts.sum(-1, keepdims=True)
        self.after: NDArray[np.float64] = counts / np.maximum(totals, 1)

    def guess(self, layer: int, hidden: Tensor | None, chosen: Tensor, k: int) -> list[int]:
        likelihood = self.after[layer][chosen.flatten().numpy()].sum(0)
        return np.argsort(-likelihood, kind="stable")[:k].tolist()


class Remembered:
    """Guesses that were made before, for a simulation of the same steps: (steps, layers) lists of experts."""

    def __init__(self, steps: list[list[list[int]]]):
        self.steps, self._next = steps, iter(steps)
        self._step: list[list[int]] = []

    def guess(self, layer: int, hidden: Tensor | None, chosen: Tensor, k: int) -> list[int]:
        if layer == 0:
            self._step = next(self._next)
        return self._step[layer][:k]
