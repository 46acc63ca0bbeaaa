"""Split the fused experts of transformers into one module per expert and run them.

transformers 5 stores a layer's experts in two fused tensors, `gate_up_proj` (E, 2f, d) and `down_proj` (E, d, f).
Here each expert has three linears, so code that quantises linears finds them. Their weights are views of the fused
tensors, so nothing is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.int8.sequences import only_rows
from haq_lab.models.families.family import PROJECTIONS, Moe

FUSED = ("gate_up_proj", "down_proj")  # names of the fused weights in transformers


class Expert(nn.Module):
    """One expert of an MoE layer: down(act(gate(x)) * up(x)).

    Args:
        gate_up: (2f, d) weights of the gate and up projections.
        down: (d, f) weight of the down projection.
        act_fn: Activation function.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: Callable[[Tensor], Tensor]):
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def with_linears(self, make: Callable[[nn.Module], nn.Module]) -> Expert:
        """Return a copy of the expert in which `make` has replaced each linear."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        for name in PROJECTIONS:
            twin.set_submodule(name, make(self.get_submodule(name)))
        return twin

    def activate(self, x: Tensor) -> Tensor:
        """Return the input (m, f) of the down projection for hidden states (m, d)."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the expert's output (m, d) for hidden states (m, d)."""
        return self.down_proj(self.activate(x))


class Experts(nn.ModuleList):
    """The experts of an MoE layer. It has the call signature of transformers' experts.

    Attributes:
        order: Order in which the next call runs the chosen experts. None runs them by index.
    """

    order: list[int] | None = None

    @classmethod
    def unfused(cls, fused: Any) -> Experts:
        """Return the experts of a fused transformers module. Their weights are views of its tensors."""
        pairs = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        return cls(Expert(gate_up, down, fused.act_fn) for gate_up, down in pairs)

    def expert(self, number: int) -> Expert:
        """Return an expert.

        Every use of an expert calls this method, so a subclass can override it to load the weights.
        """
        return cast(Expert, self[number])

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum (t, d) of the chosen experts' outputs.

        Args:
            hidden: (t, d) hidden states.
            chosen: (t, k) expert indices.
            weights: (t, k) gate weights.
        """
        return dispatch(hidden, chosen, weights, lambda number, tokens: self.expert(number)(hidden[tokens]), self.order)


def dispatch(
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    run: Callable[[int, Tensor], Tensor],
    order: list[int] | None = None,
) -> Tensor:
    """Run each chosen expert once on all its tokens and return the weighted sums of the outputs.

    The outputs of a token are summed in the router's order. So the result of a token does not depend on the other
    tokens, on the order in which experts run, or on their devices.

    Args:
        hidden: (t, d) hidden states. Only the shape and the type are used.
        chosen: (t, k) expert indices.
        weights: (t, k) gate weights.
        run: Maps an expert index and the indices (m,) of its tokens to the expert's outputs (m, d).
        order: The chosen experts in the order in which they run. None runs them by index.

    Returns:
        (t, d) weighted sums.
    """
    tokens, k = chosen.shape
    if tokens == 1:  # fast path for a decode step, which needs no sorting
        numbers, only = chosen[0].tolist(), torch.zeros(1, dtype=torch.long)
        by_number = {number: run(number, only) for number in order or sorted(set(numbers))}
        return combine(torch.cat([by_number[number] for number in numbers])[None], weights)
    flat = chosen.flatten().cpu()  # one synchronisation with the GPU, before it has work
    pairs = flat.argsort(stable=True)
    active, counts = flat[pairs].unique_consecutive(return_counts=True)
    results = hidden.new_empty(tokens * k, hidden.shape[-1])
    owners = dict(zip(active.tolist(), pairs.split(counts.tolist()), strict=True))
    for number in order or owners:
        own = owners[number] // k
        with only_rows(own):
            results[owners[number]] = run(number, own)
    return combine(results.view(tokens, k, hidden.shape[-1]), weights)


def combine(results: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum (t, d) of the experts' outputs, computed in the router's order.

    Args:
        results: (t, k, d) outputs of each token's experts in the router's order.
        weights: (t, k) gate weights.
    """
    total = torch.zeros_like(results[:, 0])
    for rank in range(results.shape[1]):
        total += (results[:, rank] * weights[:, rank, None]).to(total.dtype)
    return total


def split_fused(tensors: dict[str, Tensor], moe: Moe) -> dict[str, Tensor]:
    """Return a layer's tensors with fused expert weights replaced by views for each expert.

    Most checkpoints store each expert separately. This handles those that store them fused, as transformers does.

    Args:
        tensors: The layer's tensors by name.
        moe: The names of the experts and their linears.
    """
    gate_up, down = (tensors.get(f"{moe.experts}.{name}") for name in FUSED)
    if gate_up is None or down is None:
        return tensors
    split = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in FUSED}
    for number, (both, out) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = both.chunk(2)
        weights = zip(moe.linears(number), (gate, up, out), strict=True)
        split |= {f"{name}.weight": tensor for name, tensor in weights}
    return split


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear whose weight shares memory with `weight`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
