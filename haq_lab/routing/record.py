"""Record a routing trace: run a text through a model layer by layer, with a hook on every router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haq_lab.models.layerwise import LayeredModel
from haq_lab.routing.trace import Trace, expert_dtype
from haq_lab.utils.errors import UserError


@torch.no_grad()
def record_trace(
    model: LayeredModel,
    windows: Tensor,
    text: str,
    prompt: int = 0,
    finished: Callable[[], None] = lambda: None,
) -> Trace:
    """Record which experts the routers choose.

    Args:
        model: The model. Its layers may be in float or in int8.
        windows: (n, t) token windows, each a sequence.
        text: Name of the text.
        prompt: Number of tokens of each window that count as its prompt. The others count as decoded. The router's
            choices do not depend on it, but a cache sees a prompt as one batch and decoded tokens one by one.
        finished: Called after each layer.

    Returns:
        The trace of all windows.

    Raises:
        UserError: The model has no experts.
    """
    if model.family.moe is None:
        raise UserError(f"model: a '{model.config.model_type}' has no experts. Choose a Mixture of Experts.")
    count, length = windows.shape
    expert_count = model.family.experts(model.config)
    hidden = model.embed(windows)
    experts, weights = [], []
    for index in range(model.depth):
        layer = model.load_layer(index)
        chosen, gates = _run_and_record(model, layer, index, hidden)
        experts.append(chosen.numpy().astype(expert_dtype(expert_count)))
        weights.append(gates.to(torch.float16).numpy())
        finished()
    return Trace(
        np.stack(experts, 1),
        np.stack(weights, 1),
        np.tile(np.arange(length) >= prompt, count),
        np.arange(count, dtype=np.int64) * length,
        expert_count,
        model.folder.name,
        text,
    )


def _run_and_record(model: LayeredModel, layer: torch.nn.Module, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Run a layer on hidden states, in place, and return its router's choices and gate weights, each (n * t, k)."""
    assert model.family.moe is not None
    batches: list[tuple[Tensor, Tensor]] = []

    def on_routing(module: Any, inputs: Any, output: Any) -> None:
        _, gates, chosen = output
        batches.append((chosen, gates))

    hook = layer.get_submodule(model.family.moe.router).register_forward_hook(on_routing)
    try:
        model.run(layer, index, hidden)
    finally:
        hook.remove()
    return torch.cat([chosen for chosen, _ in batches]), torch.cat([gates for _, gates in batches])
