"""Record a routing trace: a text goes through a model a layer at a time, and every router is listened to. Or an engine
notes what its layers choose as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haq_lab.errors import UserError
from haq_lab.models.layered import LayeredModel
from haq_lab.offload.prefetch import Remembered
from haq_lab.offload.trace import Trace


class Heard:
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


@torch.no_grad()
def record_trace(
    model: LayeredModel,
    windows: Tensor,
    text: str,
    prompt: int = 0,
    finished: Callable[[], None] = lambda: None,
) -> Trace:
    """What the routers choose for token windows (n, t).

    Args:
        prompt: So many tokens of each window count as its prompt, the others as decoded. (A router's choice is the
            same either way; what differs is how a cache sees it: a prompt at once, decoded tokens one by one.)
        finished: Called after each layer.

    Raises:
        UserError: The model has no experts.
    """
    if model.family.moe is None:
        raise UserError(f"model: a '{model.config.model_type}' has no experts to trace")
    hidden = model.embed(windows)
    experts, weights = [], []
    for index in range(model.depth):
        layer = model.load_layer(index)
        heard: list[tuple[Tensor, Tensor]] = []

        def listen(module: Any, received: Any, output: Any, heard: list[tuple[Tensor, Tensor]] = heard) -> None:
            _, gates, chosen = output
            heard.append((chosen.to(torch.uint8), gates.to(torch.float16)))

        hook = layer.get_submodule(model.family.moe.router).register_forward_hook(listen)
        model.run(layer, index, hidden)
        hook.remove()
        experts.append(torch.cat([chosen for chosen, _ in heard]).numpy())
        weights.append(torch.cat([gates for _, gates in heard]).numpy())
        finished()
    count, length = windows.shape
    decode = np.tile(np.arange(length) >= prompt, count)
    starts = np.arange(count, dtype=np.int64) * length
    stacked = np.stack(experts, 1), np.stack(weights, 1)
    return Trace(*stacked, decode, starts, model.family.experts(model.config), str(model.folder.name), text)
