"""Record a routing trace: run a text through a model layer by layer, with a hook on the experts of every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from haq_lab.models.families.family import Moe
from haq_lab.models.layerwise import LayeredModel
from haq_lab.routing.choices import Routing
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
    if not model.kinds.moe_layers:
        raise UserError(f"model: a '{model.config.model_type}' has no experts. Choose a Mixture of Experts.")
    count, length = windows.shape
    routing = Routing(model.experts, model.kinds.moe_layers, (count, length))
    hidden = model.embed(windows)
    for index in range(model.depth):
        layer = model.load_layer(index)
        if (moe := model.moe_of(index)) is None:
            model.run(layer, index, hidden)
        else:
            routing.add_layer(*_run_and_record(model, layer, index, moe, hidden))
        finished()
    return routing.trace(model.folder.name, text, prompt)


def _run_and_record(
    model: LayeredModel, layer: torch.nn.Module, index: int, moe: Moe, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a layer on hidden states, in place, and return its router's choices and gate weights, each (n * t, k)."""
    batches: list[tuple[Tensor, Tensor]] = []

    def on_routing(module: Any, inputs: Any) -> None:
        _, chosen, gates = inputs
        batches.append((chosen, gates))

    hook = layer.get_submodule(moe.experts).register_forward_pre_hook(on_routing)
    try:
        model.run(layer, index, hidden)
    finally:
        hook.remove()
    return torch.cat([chosen for chosen, _ in batches]), torch.cat([gates for _, gates in batches])
