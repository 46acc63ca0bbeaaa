"""Record an engine's routing decisions and prefetch guesses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from haq_lab.offload.policies.prefetch import Remembered
from haq_lab.routing.trace import Trace


class Recorder:
    """What an engine has heard: the layers' choices, step by step, and the guesses that it made.

    Args:
        layers, experts: Of the model.
    """

    def __init__(self, layers: int, experts: int):
        self.layers, self.experts = layers, experts
        self._steps: list[list[tuple[NDArray[np.uint8], list[int]]]] = []

    def note(self, layer: int, chosen: Tensor, guesses: list[int]) -> None:
        """`layer` has chosen (t, k) experts; `guesses` are of the next layer."""
        if layer == 0:
            self._steps.append([])
        self._steps[-1].append((chosen.numpy().astype(np.uint8), guesses))

    @property
    def decoded(self) -> int:
        """Tokens decoded."""
        return sum(len(step) == self.layers and len(step[0][0]) == 1 for step in self._steps)

    def trace(self, model: str = "") -> Trace:
        """Its routing: a step of several tokens is a prompt and begins a sequence. At least one step must be whole."""
        steps = [step for step in self._steps if len(step) == self.layers]
        experts = [np.stack([chosen for chosen, _ in step], 1) for step in steps]  # each (t, layers, k)
        lengths = np.array([len(step) for step in experts])
        begins = np.cumsum(lengths) - lengths
        starts = begins[(lengths > 1) | (begins == 0)]
        whole = np.concatenate(experts)
        decode = np.repeat(lengths == 1, lengths)
        return Trace(whole, np.ones(whole.shape, np.float16), decode, starts, self.experts, model, "as it ran")

    def prefetch(self) -> Remembered:
        """The guesses again, in the order in which they were made."""
        return Remembered([[guesses for _, guesses in step] for step in self._steps if len(step) == self.layers])
