"""Make the family row of an architecture that the table does not have (`model.family=generic`).

One layer of each kind runs on random states with random weights. Linears that read the same tensor are a group. If the
tensor is the output of a norm, a factor is folded into the norm on trial. The norm is the group's source only if the
layer's output stays the same. Experts are proven by trial too (`haq_lab.models.experts.find_experts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from haq_lab.models.experts import Experts, find_experts, fused_experts, recorded_calls
from haq_lab.models.families.dense import UNPUBLISHED
from haq_lab.models.families.family import Family, Group, Moe
from haq_lab.models.families.layer_kinds import empty_model, set_depth
from haq_lab.models.families.lookup import GENERIC, family_of
from haq_lab.models.families.recorder import Recorder
from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.errors import UserError

TOKENS = 24  # of the random sequence
CLOSE = 1e-4  # largest relative change of the layer's output when a norm can take a factor
NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # their weights have three dimensions or more, as fused experts have

Key = tuple[int, ...]  # identifies the content of a tensor


def family_for(config: Any, choice: str | None) -> Family:
    """Return the row that describes a transformers config.

    Args:
        config: The transformers config.
        choice: `generic` makes a row by running the layers. None takes it from the family table.

    Raises:
        UserError: The table has no such row, or the layers cannot be run.

    Example:
        >>> family_for(HeliumConfig(), "generic").layers
        'model.layers'
    """
    return generic_family(config) if choice == GENERIC else family_of(config)


@torch.no_grad()
def generic_family(config: Any) -> Family:
    """Make the row of a transformers config by running one decoder layer of each kind.

    The memory is that of one layer in float32. Routers stay in float. So do experts that cannot be proven, and linears
    outside the experts that do not run exactly once on all tokens.

    Raises:
        UserError: A config field is missing, or the layers cannot be run one by one.
    """
    for field in NEEDED:
        if not isinstance(getattr(config, field, None), int):
            raise _refusal(config, f"its config has no {field}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the row of a checkpoint must be the same when it is loaded
            return _probe(config)
    except UserError:
        raise
    except Exception as error:  # a model's own code can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _refusal(config, f"its layers cannot be run one by one ({reason})") from error


def _refusal(config: Any, reason: str) -> UserError:
    return UserError(
        f"model.family: 'generic' does not support architecture '{config.model_type}': {reason}. "
        "Choose a supported model, or add a row to haq_lab/models/families."
    )


def _probe(config: Any, experts: bool = True) -> Family:
    """Make the row.

    Args:
        config: The transformers config.
        experts: Find the experts. They must then be the same in all layers that have some.
    """
    with torch.device("meta"):
        model = empty_model(config, config.num_hidden_layers)
    name, layers = _find_layers(model, config)
    kinds: dict[frozenset[str], int] = {}  # the first layer of each kind
    for index, layer in enumerate(layers):
        kinds.setdefault(frozenset(part for part, _ in layer.named_modules()), index)
    built, arguments = _recorded(config, name)
    by_kind: dict[frozenset[str], tuple[Group, ...]] = {}
    in_float: list[str] = []
    cached: list[str] = []
    moes: set[Moe | None] = set()
    for modules, index in kinds.items():
        with no_init_weights():
            layer = cast(Any, type(layers[index]))(built, index)
        has_experts = bool(fused_experts(layer))
        found = _Probe(layer, config, arguments[index], experts)
        moes |= {found.moe} if has_experts else set()
        by_kind[modules] = found.groups()
        in_float += found.in_float
        cached += found.cached
    if len(moes) > 1:
        return _probe(config, experts=False)
    if not any(by_kind.values()):
        raise _refusal(config, "no linear of its layers runs on all tokens")
    head = model.get_output_embeddings()
    return Family(
        config.model_type,
        name,
        _merged(by_kind),
        UNPUBLISHED,
        moe=moes.pop() if moes else None,
        cached=tuple(dict.fromkeys(cached)),
        takes_prefix=False,
        head=next(part for part, module in model.named_modules() if module is head),
        in_float=tuple(dict.fromkeys(in_float)),
        probed=True,
    )


def _find_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """Return the outermost list of `num_hidden_layers` modules, with its name. All must be of one class."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            if len({type(layer) for layer in module}) > 1:
                raise _refusal(config, "its decoder layers are of several classes")
            return name, module
    raise _refusal(config, "it has no list of num_hidden_layers decoder layers")


def _recorded(config: Any, layers: str) -> tuple[Any, list[dict[str, Any]]]:
    """Return the config with which transformers builds the layers, and the keyword arguments of each layer.

    Raises:
        UserError: The arguments depend on the tokens, or are more than tensors and numbers. Layers could not run alone.
    """
    with no_init_weights():
        shell = empty_model(config, 0, torch.float32).eval()
    set_depth(shell, config.num_hidden_layers)
    recorders = [Recorder() for _ in range(config.num_hidden_layers)]
    shell.set_submodule(layers, nn.ModuleList(recorders))
    table = cast(Tensor, shell.get_input_embeddings().weight)
    table[: 2 * TOKENS].normal_()
    runs = []
    for first in (0, TOKENS):
        shell.base_model((torch.arange(TOKENS) + first)[None] % len(table), use_cache=False)
        runs.append([recorder.arguments for recorder in recorders])
    values = [value for arguments in runs[0] for value in arguments.values()]
    if not all(isinstance(leaf, Tensor | bool | int | float | str | None) for leaf in tree_leaves(values)):
        raise _refusal(config, "its layers receive objects beside the hidden states")
    if any(isinstance(value, dict) for value in values):
        raise _refusal(config, "its layers pass states to each other")
    tensors = [[leaf for leaf in tree_leaves(run) if isinstance(leaf, Tensor)] for run in runs]
    if not all(torch.equal(one, other) for one, other in zip(*tensors, strict=True)):
        raise _refusal(config, "its layers receive the tokens beside the hidden states")
    return shell.config, runs[0]


class _Probe:
    """One decoder layer with random weights, and which of its linears read which tensors.

    Args:
        layer: The layer. Its experts are split, if they are found.
        config: The transformers config.
        arguments: Keyword arguments of the layer.
        experts: Find the experts.

    Attributes:
        moe: Names of the router and the experts, or None.
        in_float: Names of the linears outside the experts that stay in float.
        cached: Names of the linears that fill the KV cache. Without `k_proj` and `v_proj`, those that read the layer's
            first norm, which may be more.
    """

    def __init__(self, layer: nn.Module, config: Any, arguments: dict[str, Any], experts: bool):
        self._layer, self._arguments = layer.eval().requires_grad_(False), arguments
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        self._hidden = torch.randn(1, TOKENS, config.hidden_size)
        self.moe = find_experts(layer, self._run, config.model_type) if experts else None
        if self.moe is not None:
            layer.set_submodule(self.moe.experts, Experts.unfused(layer.get_submodule(self.moe.experts)))
        modules = dict(layer.named_modules())
        self._linears = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and expert_of(name) is None
        }
        routed = {} if self.moe is None else {name: modules[name] for name in (self.moe.router, self.moe.experts)}
        self._norms = {name: module for name, module in modules.items() if _may_be_norm(module)}
        with recorded_calls(self._linears | routed) as readers, recorded_calls(self._norms) as norms:
            self._output = self._run()
        read = {name: [call.arguments[0] for call in calls] for name, calls in readers.items()}
        if not isinstance(self._output, Tensor):
            raise _refusal(config, "its layers return more than hidden states")
        if not self._output.isfinite().all():
            raise _refusal(config, "its layers do not return finite numbers for random weights")
        gates = {1, *_expert_counts(layer)}  # numbers of outputs; one output is the gate of a shared expert
        self.in_float = [
            name
            for name, linear in self._linears.items()
            if len(read.get(name, ())) != 1
            or read[name][0].numel() != TOKENS * linear.in_features
            or linear.out_features in gates
        ]
        # The tensors are kept until here, so no two of them have had the same address.
        self._sources = {_key(calls[0].output): name for name, calls in norms.items() if len(calls) == 1}
        self._readers: dict[Key, list[str]] = {}
        for name, tensors in read.items():
            self._readers.setdefault(_key(tensors[0]), []).append(name)
        named = [name for name in self._linears if name.rpartition(".")[2] in ("k_proj", "v_proj")]
        self.cached = named or [name for name in next(iter(self._readers.values())) if name in self._linears]

    def _run(self) -> Any:
        return self._layer(self._hidden, **self._arguments)

    def groups(self) -> tuple[Group, ...]:
        """Return the groups in the order in which they run."""
        groups = []
        for key, readers in self._readers.items():
            consumers = tuple(name for name in readers if name in self._linears and name not in self.in_float)
            floats = tuple(name for name in readers if name in self.in_float)
            outputs: tuple[Group, ...] = ()
            if self.moe is not None and self.moe.experts in readers:
                gate, up, down = self.moe.linears("{e}")
                consumers = (*consumers, gate, up)
                floats = tuple(dict.fromkeys((self.moe.router, *floats)))
                outputs = (Group("up", up if self._folds_up(self.moe) else None, (down,)),)
            if consumers:
                groups += [self._with_source(Group("norm", self._sources.get(key), consumers, floats)), *outputs]
        return tuple(groups)

    def _with_source(self, group: Group) -> Group:
        """Return the group with the gain offset of its norm, or without a source if no offset preserves the output."""
        for offset in (0.0, 1.0):
            if group.source is not None and self._folds(group, offset):
                return replace(group, gain_offset=offset)
        return replace(group, source=None)

    def _folds(self, group: Group, offset: float) -> bool:
        norm, linears = cast(Any, self._norms[cast(str, group.source)]), [*self._modules(group.readers)]
        if len(norm.weight) != linears[0].weight.shape[1]:
            return False
        kept, factor = {parameter: parameter.clone() for parameter in norm.parameters()}, _factor(len(norm.weight))
        norm.weight.add_(offset).div_(factor).sub_(offset)
        if getattr(norm, "bias", None) is not None:
            norm.bias.div_(factor)
        for linear in linears:
            linear.weight.mul_(factor)
        same = self._returns_the_same()
        for linear in linears:
            linear.weight.div_(factor)
        for parameter, value in kept.items():
            parameter.copy_(value)
        return same

    def _folds_up(self, moe: Moe) -> bool:
        """Return whether a factor can be folded into the up projections of the experts."""
        _, ups, downs = ([*self._modules([name])] for name in moe.linears("{e}"))
        factor = _factor(downs[0].weight.shape[1])
        _fold(ups, downs, factor)
        same = self._returns_the_same()
        _fold(ups, downs, 1 / factor)
        return same

    def _modules(self, names: Iterable[str]) -> Iterator[Any]:
        """Return the modules of these names, `{e}` being each expert in turn."""
        for name in names:
            numbers = range(self.moe.count(None)) if self.moe is not None and "{e}" in name else range(1)
            yield from (self._layer.get_submodule(name.format(e=number)) for number in numbers)

    def _returns_the_same(self) -> bool:
        """Return whether the layer's output is that with the original weights."""
        change, added = self._run() - self._output, self._output - self._hidden
        return bool(change.norm() < CLOSE * added.norm())


def _factor(channels: int) -> Tensor:
    """Return random powers of two (channels,). Multiplying by them and dividing again restores a weight exactly."""
    return torch.randint(-1, 2, (channels,)).float().exp2()


def _fold(ups: list[Any], downs: list[Any], factor: Tensor) -> None:
    """Multiply the columns of the down projections by a factor and divide the outputs of the up projections by it."""
    for up, down in zip(ups, downs, strict=True):
        up.weight.div_(factor[:, None])
        if up.bias is not None:
            up.bias.div_(factor)
        down.weight.mul_(factor)


def _may_be_norm(module: nn.Module) -> bool:
    """Return whether the only parameters of a module are a weight and perhaps a bias (k,)."""
    parameters = dict(module.named_parameters())
    vectors = all(parameter.dim() == 1 for parameter in parameters.values())
    return "weight" in parameters and vectors and parameters.keys() <= {"weight", "bias"}


def _expert_counts(layer: nn.Module) -> set[int]:
    """Return the lengths of the lists of modules and of fused experts. A linear with as many outputs is a router."""
    lists = {len(module) for module in layer.modules() if isinstance(module, nn.ModuleList)}
    modules = [module for module in layer.modules() if not isinstance(module, CONVOLUTIONS)]
    own = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    return lists | {len(parameter) for parameter in own if parameter.dim() == 3}


def _key(tensor: Tensor) -> Key:
    # A view of another width is another input, and the version counts changes in place.
    return tensor.data_ptr(), tensor.shape[-1], tensor.stride(-2), tensor._version


def _merged(by_kind: dict[frozenset[str], tuple[Group, ...]]) -> tuple[Group, ...]:
    """Return groups that hold for all kinds of layers.

    Groups of several kinds with common linears are joined if each kind then still has its own group. Otherwise each of
    their linears outside the experts is a group without a source.
    """
    joined: list[Group] = []
    for group in (group for groups in by_kind.values() for group in groups):
        common = [other for other in joined if set(other.readers) & set(group.readers)]
        place = joined.index(common[0]) if common else len(joined)  # the groups stay in the order in which they run
        joined = [other for other in joined if other not in common]
        consumers = dict.fromkeys(name for other in (*common, group) for name in other.consumers)
        floats = dict.fromkeys(name for other in (*common, group) for name in other.float_consumers)
        joined.insert(place, replace(group, consumers=(*consumers,), float_consumers=(*floats,)))
    merged: list[Group] = []
    for group in joined:
        parts = [(group.within(modules), groups) for modules, groups in by_kind.items()]
        if all(part in groups for part, groups in parts if part.consumers):
            merged.append(group)
        else:
            merged += [Group("norm", None, (name,)) for name in group.consumers if "{e}" not in name]
            experts = tuple(name for name in group.consumers if "{e}" in name)
            merged += [replace(group, source=None, consumers=experts)] if experts else []
    return tuple(merged)
