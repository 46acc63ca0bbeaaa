"""Measure how much the model's predictions depend on each input and output that quantization changes.

An error e in the activations changes the model's predictions by a KL divergence of 1/2 e^T F e. F is the Fisher
information: the mean of g g^T, where g is the gradient of the log-likelihood of labels drawn from the model itself. The
diagonal of F makes the errors of different linears comparable, in nats a token, and shows which channels matter. F is
the Hessian of the loss, whereas the Hessian of a linear's input knows that linear only.

The measurement is one forward and one backward sweep through the layers, over a few windows. Layers are loaded one at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import Sensitivity
from haq_lab.models.families.family import Group
from haq_lab.models.layerwise import LayeredModel
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.malloc import release_memory

LayerSensitivity = dict[str, Sensitivity]  # by the group's site


def measure_sensitivity(model: LayeredModel, windows: Tensor, buffer: HiddenStateBuffer) -> list[LayerSensitivity]:
    """Measure the sensitivity of every group of every layer of the full-precision model.

    Args:
        model: The full-precision model.
        windows: Token windows (n, t).
        buffer: Buffer for the hidden states (n, t, d) before every layer.

    Returns:
        For each layer, the sensitivity by site.
    """
    states = [model.embed(windows, buffer.empty)]
    for index in range(model.depth):
        states.append(model.run(model.load_layer(index), index, buffer.copy(states[-1])))
        buffer.release()
        release_memory()
    gradient = states.pop()
    _differentiate_head(model, gradient)
    from_last: list[LayerSensitivity] = []
    for index in reversed(range(model.depth)):
        from_last.append(_differentiate_layer(model, index, states.pop(), gradient))
        buffer.release()
        release_memory()
    return from_last[::-1]


def _differentiate_head(model: LayeredModel, hidden: Tensor) -> None:
    """Replace the hidden states (n, t, d) after the last layer by the gradient of the log-likelihood there, in place.

    Labels are drawn from the model's own predictions.
    """
    generator = torch.Generator().manual_seed(0)
    for window in hidden.split(1):
        with torch.enable_grad():
            leaf = window.detach().clone().requires_grad_()
            logits = model.head(leaf)[0].float()
            probabilities = logits.detach().softmax(-1)
            # The gradient of the negative log-likelihood is the probabilities, minus one at the label.
            probabilities.scatter_add_(1, _draw_labels(probabilities, generator), torch.full((len(logits), 1), -1.0))
            logits.backward(probabilities)
        assert leaf.grad is not None
        window.copy_(leaf.grad)


def _draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one label for each row of (n, v): (n, 1). Inverting the CDF is ten times as fast as `torch.multinomial`."""
    cumulative = probabilities.cumsum(dim=-1)
    thresholds = torch.rand(len(cumulative), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).clamp_(max=probabilities.shape[1] - 1)


def _differentiate_layer(model: LayeredModel, index: int, hidden: Tensor, gradient: Tensor) -> LayerSensitivity:
    """Return the sensitivity of layer `index` by site, and propagate the gradient back through the layer.

    Args:
        hidden: (n, t, d) hidden states before the layer.
        gradient: (n, t, d) gradient after the layer. It is overwritten by the gradient before the layer.
    """
    layer = model.load_layer(index)
    groups, moe = model.groups_of(index), model.moe_of(index)
    experts = None if moe is None else moe.experts
    sums = {group.site: _SquaredGradients(layer, group, experts) for group in groups}
    size = model.batch_size(hidden)
    for states, after in zip(hidden.split(size), gradient.split(size), strict=True):
        with torch.enable_grad(), _record_for_backward(layer, groups, experts) as seen:
            leaf = states.detach().clone().requires_grad_()
            model.forward(layer, index, leaf).backward(after)
        assert leaf.grad is not None
        after.copy_(leaf.grad)
        for group in groups:
            sums[group.site].add(seen)
    tokens = hidden.shape[0] * hidden.shape[1]
    return {site: squares.finish(tokens) for site, squares in sums.items()}


@contextmanager
def _record_for_backward(
    layer: nn.Module, groups: tuple[Group, ...], experts: str | None
) -> Iterator[dict[str, Tensor]]:
    """Record `NAME.in` and `NAME.out` of each linear during a forward of `layer`; a backward then sets their gradients.

    If experts share an input, it is recorded where it enters the experts module.
    """
    seen: dict[str, Tensor] = {}

    def record_input(name: str) -> Callable[..., object]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # A view is its own node in the graph, so its gradient comes from this module only.
            alias = arguments[0].view_as(arguments[0])
            alias.retain_grad()
            seen[f"{name}.in"] = alias
            return (alias, *arguments[1:])

        return hook

    def record_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[f"{name}.out"] = output

        return hook

    handles = []
    for group in groups:
        for name in _input_modules(group, experts):
            handles.append(layer.get_submodule(name).register_forward_pre_hook(record_input(name)))
        for name in group.consumers:
            handles.append(layer.get_submodule(name).register_forward_hook(record_output(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _input_modules(group: Group, experts: str | None) -> tuple[str, ...]:
    """Return the modules whose input is the group's input."""
    if experts is None or not group.feeds_experts:
        return group.consumers
    return (experts, *group.consumers_by_expert().get(None, ()))


class _SquaredGradients:
    """Sums of the squared gradients of one group over tokens."""

    def __init__(self, layer: nn.Module, group: Group, experts: str | None):
        weights: list[Tensor] = [layer.get_submodule(name).weight for name in group.consumers]  # type: ignore[misc]
        self._input_modules = _input_modules(group, experts)
        self._channels = torch.zeros(weights[0].shape[1])
        self._outputs = {name: torch.zeros(len(weight)) for name, weight in zip(group.consumers, weights, strict=True)}

    def add(self, seen: dict[str, Tensor]) -> None:
        """Add one batch, in which an expert may have no token."""
        gradients = [_gradient(seen[f"{name}.in"]) for name in self._input_modules if f"{name}.in" in seen]
        if gradients:
            rows = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
            self._channels += _sum_of_squares(torch.stack(rows).sum(dim=0))
        for name, total in self._outputs.items():
            if f"{name}.out" in seen:
                total += _sum_of_squares(_gradient(seen[f"{name}.out"]))

    def finish(self, tokens: int) -> Sensitivity:
        """Return the means over all tokens, including those that were not routed to the expert."""
        return Sensitivity(self._channels / tokens, torch.cat(list(self._outputs.values())) / tokens)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "the backward did not reach this tensor"
    return tensor.grad


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)
