"""The experts of a Mixture-of-Experts layer as ordinary linears.

transformers 5 keeps a layer's experts fused, as `gate_up_proj` (E, 2f, d) and `down_proj` (E, d, f), where nothing
that walks over linears finds them. Here each expert has its own three, and their weights are views of the fused
tensors: nothing is copied, and whatever works on linears works on experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

FUSED = ("gate_up_proj", "down_proj")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x))."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: Callable[[Tensor], Tensor]):
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def with_linears(self, make: Callable[[nn.Module], nn.Module]) -> Expert:
        """The same expert with other linears, which `make` makes of its own."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        for name in PROJECTIONS:
            twin.set_submodule(name, make(self.get_submodule(name)))
        return twin

    def activate(self, x: Tensor) -> Tensor:
        """(m, d) -> (m, f), what the down projection reads."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """(m, d) -> (m, d)."""
        return self.down_proj(self.activate(x))


class Experts(nn.ModuleList):
    """All experts of a layer, called as transformers calls its own. Children are named by their number.

    `order` says in which order the next call runs its experts; None leaves it to their numbers.
    """

    order: list[int] | None = None

    @classmethod
    def unfused(cls, fused: Any) -> Experts:
        """The experts of one of transformers' fused modules, as views of its tensors."""
        pairs = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        return cls(Expert(gate_up, down, fused.act_fn) for gate_up, down in pairs)

    def expert(self, number: int) -> Expert:
        """Where every use of an expert passes: the one place to decide where its weights come from."""
        return cast(Expert, self[number])

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Hidden states (t, d), expert numbers (t, k) and gate weights (t, k) -> (t, d)."""
        return dispatch(hidden, chosen, weights, lambda number, tokens: self.expert(number)(hidden[tokens]), self.order)


def dispatch(
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    run: Callable[[int, Tensor], Tensor],
    order: list[int] | None = None,
) -> Tensor:
    """Run each expert once, over all the tokens that chose it, and sum a token's results by their gate weights.

    Results are summed in the order of the router's choice, whichever expert ran first: neither the other tokens
    nor the order or place in which experts run changes a bit.

    Args:
        hidden: (t, d), for its size and type.
        chosen: (t, k) expert numbers.
        weights: (t, k) gate weights.
        run: From an expert's number and the tokens (m,) that chose it to their results (m, d).
        order: The chosen experts in the order in which they run; None takes them by number.
    """
    tokens, k = chosen.shape
    if tokens == 1:  # a decode step has nothing to sort
        numbers, only = chosen[0].tolist(), torch.zeros(1, dtype=torch.long)
        by_number = {number: run(number, only) for number in order or sorted(set(numbers))}
        return combined(torch.cat([by_number[number] for number in numbers])[None], weights)
    flat = chosen.flatten().cpu()  # a GPU is asked once, before it has work
    pairs = flat.argsort(stable=True)
    active, counts = flat[pairs].unique_consecutive(return_counts=True)
    results = hidden.new_empty(tokens * k, hidden.shape[-1])
    owners = dict(zip(active.tolist(), pairs.split(counts.tolist()), strict=True))
    for number in order or owners:
        results[owners[number]] = run(number, owners[number] // k)
    return combined(results.view(tokens, k, hidden.shape[-1]), weights)


def combined(results: Tensor, weights: Tensor) -> Tensor:
    """Results (t, k, d) of each token's experts, in the router's order, times gate weights (t, k), summed: (t, d)."""
    total = torch.zeros_like(results[:, 0])
    for rank in range(results.shape[1]):
        total += (results[:, rank] * weights[:, rank, None]).to(total.dtype)
    return total


def split_fused(tensors: dict[str, Tensor], experts: str) -> dict[str, Tensor]:
    """A layer's tensors with fused ones replaced by views under the experts' own names.

    Checkpoints hold experts one by one, but for those that were saved as transformers has them in memory.
    """
    gate_up, down = (tensors.get(f"{experts}.{name}") for name in FUSED)
    if gate_up is None or down is None:
        return tensors
    split = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in FUSED}
    for number, (both, out) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = both.chunk(2)
        own = {"gate_proj": gate, "up_proj": up, "down_proj": out}
        split |= {f"{experts}.{number}.{name}.weight": tensor for name, tensor in own.items()}
    return split


def _linear(weight: Tensor) -> nn.Linear:
    """A linear on this very tensor."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
