"""Record a routing trace: a text goes through a model a layer at a time, and every router is listened to. Or an engine
notes what its layers choose as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haq_lab.models.layerwise import LayeredModel
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import UserError


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
