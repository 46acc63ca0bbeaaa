"""Guess which experts the next layer will choose, while the current layer computes.

Guessed experts are read into spare slots outside the cache, so a wrong guess costs only a read
(mixtral-offloading, arXiv 2312.17238).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haq_lab.routing.statistics import transitions
from haq_lab.routing.trace import Trace


class Prefetch(Protocol):
    """Interface of the prefetch methods."""

    def guess(self, layer: int, hidden: Tensor | None, chosen: Tensor, k: int) -> list[int]:
        """Return at most k experts of the next layer, the most likely first.

        Args:
            layer: Index of the current layer.
            hidden: Hidden states (t, d) that this layer's experts receive. None in a simulator.
            chosen: Experts (t, k) that this layer chose, on the CPU.
            k: Largest number of guesses.
        """
        ...


class NextGate:
    """Applies the next layer's router to the current hidden states, because these change little between layers.

    Args:
        routers: The router of each layer. It maps hidden states (t, d) to logits, gate weights and chosen experts.
    """

    def __init__(self, routers: list[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]):
        self.routers = routers

    def guess(self, layer: int, hidden: Tensor | None, chosen: Tensor, k: int) -> list[int]:
        assert hidden is not None, "a router needs hidden states. A simulator replays an engine's guesses"
        _, weights, experts = self.routers[layer + 1](hidden)
        weights, experts = weights.cpu(), experts.cpu()
        wanted = torch.zeros(int(experts.max()) + 1).index_add_(0, experts.flatten(), weights.flatten().float())
        return wanted.argsort(descending=True, stable=True)[: min(k, int((wanted > 0).sum()))].tolist()


class NextOnPath:
    """Guesses the experts that tokens of the calibration trace chose after the current ones.

    Args:
        profile: The calibration trace.
    """

    def __init__(self, profile: Trace):
        counts = transitions(profile)  # (layers - 1, E, E)
        totals = counts.sum(-1, keepdims=True)
        self.after: NDArray[np.float64] = counts / np.maximum(totals, 1)

    def guess(self, layer: int, hidden: Tensor | None, chosen: Tensor, k: int) -> list[int]:
        likelihood = self.after[layer][chosen.flatten().numpy()].sum(0)
        return np.argsort(-likelihood, kind="stable")[:k].tolist()


class Remembered:
    """Replays the guesses of an engine, to simulate the same steps.

    Args:
        steps: Guessed experts by step and layer.
    """

    def __init__(self, steps: list[list[list[int]]]):
        self.steps, self._next = steps, iter(steps)
        self._step: list[list[int]] = []

    def guess(self, layer: int, hidden: Tensor | None, chosen: Tensor, k: int) -> list[int]:
        if layer == 0:
            self._step = next(self._next)
        return self._step[layer][:k]
