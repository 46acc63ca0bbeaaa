"""Split the fused experts of transformers into one module per expert and run them.

transformers 5 stores a layer's experts in two fused tensors, `gate_up_proj` (E, 2f, d) and `down_proj` (E, d, f).
Here each expert has three linears, so code that quantises linears finds them. Their weights are views of the fused
tensors, so nothing is copied. Some architectures transpose the tensors, interleave gate and up, or have biases
(`FusedLayout`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from haq_lab.int8.sequences import only_rows
from haq_lab.models.families.family import PROJECTIONS, Moe
from haq_lab.models.families.stored_forms import in_module_form
from haq_lab.storage.tensor_names import expert_of

SAME = 1e-4  # largest relative difference between split and fused experts, whose products are computed apart
FUSED = ("gate_up_proj", "down_proj")  # names of the fused weights in transformers; biases end with `_bias`
Gating = Callable[[Tensor, Tensor], Tensor]  # (m, f) outputs of gate and up projection -> input of the down projection


class Expert(nn.Module):
    """One expert of an MoE layer: down(gating(gate(x), up(x))).

    Args:
        linears: The gate, up and down projections.
        gating: Combines the outputs of gate and up projection.
    """

    def __init__(self, linears: Iterable[nn.Module], gating: Gating):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linears
        self.gating = gating

    def with_linears(self, make: Callable[[nn.Module], nn.Module]) -> Expert:
        """Return a copy of the expert in which `make` has replaced each linear."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        for name in PROJECTIONS:
            twin.set_submodule(name, make(self.get_submodule(name)))
        return twin

    def activate(self, x: Tensor) -> Tensor:
        """Return the input (m, f) of the down projection for hidden states (m, d)."""
        return self.gating(self.gate_proj(x), self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return the expert's output (m, d) for hidden states (m, d)."""
        return self.down_proj(self.activate(x))


class Experts(nn.ModuleList):
    """The experts of an MoE layer. It has the call signature of transformers' experts.

    Attributes:
        order: Order in which the next call runs the chosen experts. None runs them by index.
        layout: Layout of the fused tensors that hold the experts' weights in checkpoints of this architecture.
    """

    order: list[int] | None = None
    layout: FusedLayout

    @classmethod
    def unfused(cls, fused: Any) -> Experts:
        """Return the experts of a fused transformers module. Their weights are views of its tensors."""
        layout = FusedLayout.of(fused)
        tensors = {name: tensor.detach() for name, tensor in fused.named_parameters()}
        parts, gating = layout.split(tensors), gating_of(fused)
        experts = cls(Expert(map(_linear, *own), gating) for own in parts)
        experts.layout = layout
        return experts

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


@dataclass(frozen=True)
class FusedLayout:
    """Layout of fused expert tensors, as transformers describes it on the module of the experts.

    Attributes:
        transposed: The tensors are (E, inputs, outputs), not (E, outputs, inputs).
        interleaved: The outputs are gate 0, up 0, gate 1, up 1 and so on. If false, all gates come first.
    """

    transposed: bool = False
    interleaved: bool = False

    @classmethod
    def of(cls, fused: Any) -> FusedLayout:
        """Return the layout of a fused module of transformers."""
        return cls(getattr(fused, "is_transposed", False), not getattr(fused, "is_concatenated", True))

    def split(self, tensors: dict[str, Tensor]) -> list[tuple[list[Tensor], list[Tensor | None]]]:
        """Split fused tensors.

        Args:
            tensors: `gate_up_proj`, `down_proj` and their biases `gate_up_proj_bias` and `down_proj_bias`, if any.

        Returns:
            For each expert, views of its three weights and of its three biases. A bias may be None.
        """
        both, down = (tensors[name].transpose(1, 2) if self.transposed else tensors[name] for name in FUSED)
        biases = [tensors.get(f"{name}_bias") for name in FUSED]
        none = [None] * len(down)
        gate_up_bias, down_bias = (none if bias is None else bias.unbind() for bias in biases)
        return [
            ([*self._halves(both[number]), down[number]], [*self._halves(gate_up_bias[number]), down_bias[number]])
            for number in range(len(down))
        ]

    def _halves(self, outputs: Tensor | None) -> tuple[Any, Any]:
        """Return the gate's and the up projection's part of (2f, ...)."""
        if outputs is None:
            return None, None
        if self.interleaved:
            return outputs[::2], outputs[1::2]
        gate, up = outputs.chunk(2)
        return gate, up


def gating_of(fused: Any) -> Gating:
    """Return what a fused module of transformers computes between its two products, without its weights."""
    if (act_fn := getattr(fused, "act_fn", None)) is not None:
        return gated_by(act_fn)
    plain = {name: value for name, value in vars(fused).items() if isinstance(value, (bool, int, float))}
    return partial(_apply_gate, type(fused)._apply_gate, SimpleNamespace(**plain), FusedLayout.of(fused).interleaved)


def gated_by(act_fn: Callable[[Tensor], Tensor]) -> Gating:
    """Return the gating act_fn(gate) * up."""
    return partial(_gate, act_fn)


def _gate(act_fn: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act_fn(gate) * up


def _apply_gate(function: Any, attributes: Any, interleaved: bool, gate: Tensor, up: Tensor) -> Tensor:
    both = torch.stack((gate, up), dim=-1).flatten(-2) if interleaved else torch.cat((gate, up), dim=-1)
    return cast(Tensor, function(attributes, both))


def split_fused(tensors: dict[str, Tensor], moe: Moe, layout: FusedLayout) -> dict[str, Tensor]:
    """Return a layer's tensors with fused expert tensors replaced by views for each expert.

    Most checkpoints store each expert separately. This handles those that store them fused, as transformers does.

    Args:
        tensors: The layer's tensors by name.
        moe: The names of the experts and their linears.
        layout: Layout of the fused tensors.
    """
    names = [f"{name}{suffix}" for name in FUSED for suffix in ("", "_bias")]
    fused = {name: tensors[full] for name in names if (full := f"{moe.experts}.{name}") in tensors}
    if not all(name in fused for name in FUSED):
        return tensors
    split = {name: tensor for name, tensor in tensors.items() if name.removeprefix(f"{moe.experts}.") not in fused}
    for number, (weights, biases) in enumerate(layout.split(fused)):
        for linear, weight, bias in zip(moe.linears(number), weights, biases, strict=True):
            split[f"{linear}.weight"] = weight
            if bias is not None:
                split[f"{linear}.bias"] = bias
    return split


def fuse_experts(tensors: dict[str, Tensor], moe: Moe, layout: FusedLayout) -> dict[str, Tensor]:
    """Return a layer's tensors with those of its experts fused, as transformers stores them.

    Args:
        tensors: The layer's tensors by name, with float weights `NAME.weight` and biases `NAME.bias` of each expert.
        moe: The names of the experts and their linears.
        layout: Layout of the fused tensors.
    """
    fused = {name: tensor for name, tensor in tensors.items() if expert_of(name) is None}
    count = 1 + max(number for name in tensors if (number := expert_of(name)) is not None)
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        if f"{moe.linears(0)[0]}.{kind}" not in tensors:
            continue
        names = zip(*(moe.linears(number) for number in range(count)), strict=True)
        gate, up, down = (torch.stack([tensors[f"{name}.{kind}"] for name in own]) for own in names)
        both = torch.stack((gate, up), dim=2).flatten(1, 2) if layout.interleaved else torch.cat((gate, up), dim=1)
        for name, tensor in zip(FUSED, (both, down), strict=True):
            turned = tensor.transpose(1, 2) if layout.transposed and kind == "weight" else tensor
            fused[f"{moe.experts}.{name}{suffix}"] = turned.contiguous()
    return fused


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear whose tensors share memory with the given ones."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


@torch.no_grad()
def find_experts(layer: nn.Module, run: Callable[[], object], model_type: str) -> Moe | None:
    """Find the router and the experts of a decoder layer by running it.

    They are proven by trial. The split experts return what the fused ones return. The router receives the experts'
    hidden states and returns their indices.

    Args:
        layer: The layer with weights, as transformers defines it.
        run: Runs the layer.
        model_type: The architecture, which says how checkpoints store the experts.

    Returns:
        None if the layer has no fused experts, or if they cannot be proven.
    """
    names = fused_experts(layer)
    block, _, last = names[0].rpartition(".") if len(names) == 1 else ("", "", "")
    if not block or last != "experts":  # `expert_of` parses this name
        return None
    parts = {name: part for name, part in layer.named_modules() if name.startswith(f"{block}.")}
    with recorded_calls(parts) as recorded:
        run()
    positional = {name: [call for call in calls if not call.named] for name, calls in recorded.items()}
    calls = {name: (own[-1].arguments, own[-1].output) for name, own in positional.items() if own}
    fused: Any = layer.get_submodule(names[0])
    try:
        ((hidden, chosen, weights), output), split = calls[names[0]], Experts.unfused(fused)
        wanted, got = output, split(hidden, chosen, weights)
        if not (got - wanted).norm() < SAME * wanted.norm():
            return None
        count, width = len(split), cast(nn.Linear, split.expert(0).down_proj).in_features
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # they are something else
        return None
    buffers = {id(buffer): name for name, buffer in layer.named_buffers()}
    for router, (arguments, output) in calls.items():
        if _routes(layer.get_submodule(router), arguments, output, hidden, chosen):
            if not all(id(other) in buffers for other in arguments[1:]):
                return None
            normalized = bool(torch.allclose(weights.sum(dim=1), weights.new_ones(len(weights)), rtol=SAME))
            taken = tuple(buffers[id(other)] for other in arguments[1:])
            moe = Moe(count, chosen.shape[1], width, normalized, router, names[0], taken)
            return moe if _stored_apart(fused, moe, split.layout, model_type) else replace(moe, fused=True)
    return None


def fused_experts(layer: nn.Module) -> list[str]:
    """Return the names of a layer's modules that hold fused experts."""
    return [
        name
        for name, module in layer.named_modules()
        if all(isinstance(tensor := getattr(module, part, None), nn.Parameter) and tensor.dim() == 3 for part in FUSED)
    ]


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        arguments: Positional arguments.
        named: Keyword arguments.
        output: What it returned.
    """

    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


@contextmanager
def recorded_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Record the calls of modules by name during the block, in the order in which they return."""
    calls: dict[str, list[Call]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *call: Any) -> None:
            calls.setdefault(name, []).append(Call(*call))

        return hook

    handles = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _routes(module: nn.Module, arguments: Any, output: Any, hidden: Tensor, chosen: Tensor) -> bool:
    """Return whether a module reads the experts' hidden states and returns logits, weights and the chosen indices."""
    weight: Any = getattr(module, "weight", None)
    return (
        isinstance(output, tuple)
        and len(output) == 3
        and all(isinstance(tensor, Tensor) for tensor in (*output, *arguments, weight))
        and output[1].shape == output[2].shape == chosen.shape
        and torch.equal(output[2], chosen)
        and arguments[0].data_ptr() == hidden.data_ptr()
        and weight.shape == (output[0].shape[-1], hidden.shape[-1])
    )


def _stored_apart(fused: nn.Module, moe: Moe, layout: FusedLayout, model_type: str) -> bool:
    """Return whether transformers fuses tensors of single experts, named as in `moe`, to these experts."""
    tensors = {f"{moe.experts}.{name}": tensor.detach() for name, tensor in fused.named_parameters()}
    again = in_module_form(split_fused(tensors, moe, layout), model_type)
    return again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
