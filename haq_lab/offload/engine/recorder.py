"""Record an engine's routing decisions and prefetch guesses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from haq_lab.offload.policies.prefetch import Remembered
from haq_lab.routing.trace import Trace, expert_dtype


class Recorder:
    """Records the routing decisions and prefetch guesses of an engine.

    Args:
        layers: Number of layers of the model.
        experts: Number of experts per layer.
    """

    def __init__(self, layers: int, experts: int):
        self.layers, self.experts = layers, experts
        self._steps: list[list[tuple[NDArray[Any], list[int]]]] = []

    def record(self, layer: int, chosen: Tensor, guesses: list[int]) -> None:
        """Record one layer of one step.

        Args:
            layer: Index of the layer. Layer 0 starts a step.
            chosen: (t, k) chosen experts, on the CPU.
            guesses: Experts of the next layer that the prefetch predicted.
        """
        if layer == 0:
            self._steps.append([])
        self._steps[-1].append((chosen.numpy().astype(expert_dtype(self.experts)), guesses))

    @property
    def decoded(self) -> int:
        """Number of decoded tokens."""
        return sum(len(step) == self.layers and len(step[0][0]) == 1 for step in self._steps)

    def trace(self, model: str = "") -> Trace:
        """Return the routing of all complete steps. There must be at least one.

        A step of several tokens is a prompt and starts a sequence.

        Args:
            model: Name of the model, for the trace.
        """
        steps = [step for step in self._steps if len(step) == self.layers]
        experts = [np.stack([chosen for chosen, _ in step], 1) for step in steps]  # each (t, layers, k)
        lengths = np.array([len(step) for step in experts])
        begins = np.cumsum(lengths) - lengths
        starts = begins[(lengths > 1) | (begins == 0)]
        whole = np.concatenate(experts)
        decode = np.repeat(lengths == 1, lengths)
        return Trace(whole, np.ones(whole.shape, np.float16), decode, starts, self.experts, model, "as it ran")

    def prefetch(self) -> Remembered:
        """Return a prefetch that repeats the recorded guesses in order."""
        return Remembered([[guesses for _, guesses in step] for step in self._steps if len(step) == self.layers])
