"""How much the model's predictions depend on each number that quantization disturbs.

Disturbing activations by e moves the model's predictions by a KL divergence of 1/2 e^T F e, where F is the Fisher
information: the mean of g g^T over labels drawn from the model itself, g the gradient of their log-likelihood. Its
diagonal makes the errors of different linears comparable, in nats a token, and says which of their channels matter.
This is the Hessian of the loss; the Hessian of a linear's input knows that linear alone.

One sweep forward and one back through the layers, over few windows; each layer is read when it is its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import Sensitivity
from haq_lab.models.architectures import Group
from haq_lab.models.layerwise import LayeredModel
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.malloc import release_memory

LayerSensitivity = dict[str, Sensitivity]  # by the group's site


def measure_sensitivity(model: LayeredModel, windows: Tensor, spool: HiddenStateBuffer) -> list[LayerSensitivity]:
    """The sensitivity of every group of every layer of the full-precision model.

    Args:
        windows: Token windows (n, t).
        spool: Room for the hidden states before each layer, (n, t, d) times the depth.
    """
    states = [model.embed(windows, spool.empty)]
    for index in range(model.depth):
        states.append(model.run(model.load_layer(index), index, spool.copy(states[-1])))
        spool.release()
        release_memory()
    gradient = states.pop()
    _differentiate_head(model, gradient)
    found: list[LayerSensitivity] = []
    for index in reversed(range(model.depth)):
        found.append(_differentiate_layer(model, index, states.pop(), gradient))
        spool.release()
        release_memory()
    return found[::-1]


def _differentiate_head(model: LayeredModel, hidden: Tensor) -> None:
    """Hidden states after the last layer (n, t, d) -> the log-likelihood's gradient there, in place; labels are
    drawn from the model's own predictions."""
    generator = torch.Generator().manual_seed(0)
    for window in hidden.split(1):
        with torch.enable_grad():
            leaf = window.detach().clone().requires_grad_()
            logits = model.head(leaf)[0].float()
            probabilities = logits.detach().softmax(-1)
            # Of the negative log-likelihood of a label: the probabilities, less one at the label.
            probabilities.scatter_add_(1, _drawn(probabilities, generator), torch.full((len(logits), 1), -1.0))
            logits.backward(probabilities)
        assert leaf.grad is not None
        window.copy_(leaf.grad)


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row of (n, v), (n, 1), by its distribution function: `torch.multinomial` takes ten times as long."""
    reached = probabilities.cumsum(dim=-1)
    wanted = torch.rand(len(reached), 1, generator=generator) * reached[:, -1:]
    return torch.searchsorted(reached, wanted, right=True).clamp_(max=probabilities.shape[1] - 1)


def _differentiate_layer(model: LayeredModel, index: int, hidden: Tensor, gradient: Tensor) -> LayerSensitivity:
    """Layer `index` at the states before it, (n, t, d): its groups' sensitivities from the gradient after it, which
    becomes the gradient before it, in place."""
    layer = model.load_layer(index)
    experts = None if model.family.moe is None else model.family.moe.experts
    taps = {group.site: _Tap(layer, group, experts) for group in model.groups}
    size = model.batch_size(hidden)
    for states, after in zip(hidden.split(size), gradient.split(size), strict=True):
        with torch.enable_grad(), _tapped(layer, model.groups, experts) as seen:
            leaf = states.detach().clone().requires_grad_()
            model.forward(layer, index, leaf).backward(after)
        assert leaf.grad is not None
        after.copy_(leaf.grad)
        for group in model.groups:
            taps[group.site].add(seen)
    tokens = hidden.shape[0] * hidden.shape[1]
    return {site: tap.finish(tokens) for site, tap in taps.items()}


@contextmanager
def _tapped(layer: nn.Module, groups: tuple[Group, ...], experts: str | None) -> Iterator[dict[str, Tensor]]:
    """Within the block, a forward of `layer` leaves `NAME.in` and `NAME.out` of each linear in the yielded dict; after
    a backward they have gradients. Where experts share an input, it is seen where it enters them."""
    seen: dict[str, Tensor] = {}

    def enters(name: str) -> Callable[..., object]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # A name of its own in the graph: its gradient is then of this reader alone.
            alias = arguments[0].view_as(arguments[0])
            alias.retain_grad()
            seen[f"{name}.in"] = alias
            return (alias, *arguments[1:])

        return hook

    def leaves(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[f"{name}.out"] = output

        return hook

    handles = []
    for group in groups:
        for name in _entrances(group, experts):
            handles.append(layer.get_submodule(name).register_forward_pre_hook(enters(name)))
        for name in group.consumers:
            handles.append(layer.get_submodule(name).register_forward_hook(leaves(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _entrances(group: Group, experts: str | None) -> tuple[str, ...]:
    """The modules at which the group's input enters what is quantised."""
    return (experts,) if experts is not None and group.float_consumers else group.consumers


class _Tap:
    """Squared gradients of one group, summed over tokens."""

    def __init__(self, layer: nn.Module, group: Group, experts: str | None):
        weights: list[Tensor] = [layer.get_submodule(name).weight for name in group.consumers]  # type: ignore[misc]
        self._entrances = _entrances(group, experts)
        self._channels = torch.zeros(weights[0].shape[1])
        self._outputs = {name: torch.zeros(len(weight)) for name, weight in zip(group.consumers, weights, strict=True)}

    def add(self, seen: dict[str, Tensor]) -> None:
        """One batch; an expert may have had no token in it."""
        readers = [_gradient(seen[f"{name}.in"]) for name in self._entrances if f"{name}.in" in seen]
        if readers:
            self._channels += _squares(torch.stack(readers).sum(dim=0))
        for name, total in self._outputs.items():
            if f"{name}.out" in seen:
                total += _squares(_gradient(seen[f"{name}.out"]))

    def finish(self, tokens: int) -> Sensitivity:
        """Means over all tokens, those that an expert never saw included."""
        return Sensitivity(self._channels / tokens, torch.cat(list(self._outputs.values())) / tokens)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "not reached by the backward"
    return tensor.grad


def _squares(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)
