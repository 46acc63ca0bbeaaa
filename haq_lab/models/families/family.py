"""Describe one architecture: the linears that share an input, what takes a smoothing factor, and the experts.

Module names are relative to a decoder layer. `{e}` is a placeholder for the expert index.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from haq_lab.storage.tensor_names import expert_of

WRAPPED = "language_model."  # part of the names of the language model's tensors in a multimodal checkpoint
FoldKind = Literal["norm", "value", "up"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # names of an expert's linears in our modules


@dataclass(frozen=True)
class Group:
    """Linears that share an input, and the module that computes this input (the source).

    The layer's output does not change if the source's output channels are divided by s and the consumers' weight
    columns are multiplied by s. SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) use this.

    Attributes:
        kind: How s is folded into the source. `norm` scales weight and bias. `value` scales the rows of the value
            projection, and the query heads of one key-value head share s. `up` scales the rows of the up projection.
            The activation between is a product or positively homogeneous, so it does not change the factor.
        source: Name of the source. None if nothing can be folded into it. The group then only shares an input.
        consumers: Names of the quantised linears.
        float_consumers: Names of the linears that share the input but stay in full precision, such as the router of
            an MoE layer. Their columns are multiplied by s too.
        gain_offset: What the norm adds to its weight to get its gain. Gemma's norms multiply by 1 + weight.
        fused: Whether the source is several projections in one linear. Its last rows compute the input.
    """

    kind: FoldKind
    source: str | None
    consumers: tuple[str, ...]
    float_consumers: tuple[str, ...] = ()
    gain_offset: float = 0.0
    fused: bool = False

    @property
    def readers(self) -> tuple[str, ...]:
        """Return the names of all linears that share the input."""
        return self.consumers + self.float_consumers

    @property
    def expert(self) -> int | None:
        """Return the index of the expert that computes the input, or None if it is computed outside the experts."""
        return expert_of(self.consumers[0]) if self.kind == "up" else None

    @property
    def site(self) -> str:
        """Return the module whose input hook sees the shared input of all tokens, whatever the routing."""
        first = (*self.float_consumers, *self.consumers)[0]
        number = expert_of(first) if self.feeds_experts else None
        return first if number is None else first.partition(f".{number}.")[0]

    @property
    def feeds_experts(self) -> bool:
        """Return whether the experts of a layer share the input."""
        return self.expert is None and expert_of(self.consumers[-1]) is not None

    def consumers_by_expert(self) -> dict[int | None, tuple[str, ...]]:
        """Return the consumers by expert index. The key None has those outside the experts."""
        by_expert: dict[int | None, tuple[str, ...]] = {}
        for name in self.consumers:
            by_expert[expert_of(name)] = (*by_expert.get(expert_of(name), ()), name)
        return by_expert

    def for_expert(self, number: int) -> Group:
        """Return the group with the placeholder `{e}` replaced by an expert index."""
        source = self.source and self.source.format(e=number)
        return replace(self, source=source, consumers=tuple(name.format(e=number) for name in self.consumers))

    def within(self, modules: Collection[str]) -> Group:
        """Return the group without the readers that are not among these names of a layer's modules."""
        consumers = tuple(name for name in self.consumers if name.partition(".{e}")[0] in modules)
        in_float = tuple(name for name in self.float_consumers if name in modules)
        return replace(self, consumers=consumers, float_consumers=in_float)


@dataclass(frozen=True)
class Moe:
    """The router and the experts of an MoE architecture: their module names and their config fields.

    The router returns logits (t, E), gate weights (t, k) and expert indices (t, k). The experts are called with the
    hidden states (t, d), the indices and the weights. `haq_lab.models.experts` splits fused experts. An expert's
    linears are named `PROJECTIONS`.

    Attributes:
        count_field: Config field with the number of experts in a layer. It and the next three may be the value itself.
        active_field: Config field with the number of active experts for each token, k.
        width_field: Config field with an expert's intermediate size.
        normalized_field: Config field that says whether a token's k gate weights are divided by their sum. None if
            they always are.
        router: Name of the router.
        experts: Name of the module list of the experts.
        router_buffers: Names of the buffers that the router takes beside the hidden states.
        stored: Names of an expert's linears in checkpoints, in the order of `PROJECTIONS`.
        fused: Whether transformers reads the experts only as fused tensors of a layer.
    """

    count_field: str | int
    active_field: str | int = "num_experts_per_tok"
    width_field: str | int = "intermediate_size"
    normalized_field: str | bool | None = None
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    router_buffers: tuple[str, ...] = ()
    stored: tuple[str, str, str] = PROJECTIONS
    fused: bool = False

    def count(self, config: Any) -> int:
        """Return the number of experts in a layer."""
        return _value(config, self.count_field)

    def active(self, config: Any) -> int:
        """Return the number of active experts for each token, k."""
        return _value(config, self.active_field)

    def width(self, config: Any) -> int:
        """Return the intermediate size of an expert."""
        return _value(config, self.width_field)

    def is_normalized(self, config: Any) -> bool:
        """Return whether the k gate weights of a token are divided by their sum."""
        return self.normalized_field is None or bool(_value(config, self.normalized_field))

    def linears(self, expert: int | str) -> tuple[str, str, str]:
        """Return the names of an expert's gate, up and down projections."""
        gate, up, down = (f"{self.experts}.{expert}.{name}" for name in PROJECTIONS)
        return gate, up, down

    def router_of(self, layer: Any) -> Callable[[Any], tuple[Any, Any, Any]]:
        """Return a function that maps hidden states (t, d) to logits (t, E), gate weights (t, k) and experts (t, k)."""
        router = layer.get_submodule(self.router)
        return lambda hidden: router(hidden, *(layer.get_buffer(name) for name in self.router_buffers))

    @property
    def block(self) -> str:
        """Return the name of the MoE block, which contains both. The layer calls it with hidden states (b, t, d)."""
        return self.router.rpartition(".")[0]


def _value(config: Any, field: str | int) -> int:
    """Return the value of a config field. A number is its own value."""
    return getattr(config, field) if isinstance(field, str) else field


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: The `model_type` of the transformers config.
        layers: Name of the list of decoder layers in the model.
        groups: The linears of all kinds of layers, grouped by shared input. A layer has those that it has modules for.
        smoothquant_strength: The migration strength alpha that SmoothQuant's authors published for it.
        requires: Config fields with the values that the row supports. Other fields may have any value.
        moe: Names of the router and the experts. None for a dense model.
        head_norms: Names of the query and key norms between projection and rotary embedding. Empty for most models.
        output_norms: Names of the norms of what attention and MLP add to the residual stream. Empty for most models.
        renamed: Pairs of name parts: the part in checkpoints, and the part in our modules.
        learned_positions: Name of the table of learned positions in the model. None with rotary embeddings.
        cached: Names of the linears whose outputs the KV cache holds.
        attention: Name of the attention module within a layer.
        wrapper: Model type of a multimodal model whose language model this is. Only the language model is read.
        takes_prefix: Whether keys and values can be put before those of every sequence, in every layer.
        head: Name of the head.
        in_float: Names of linears outside the groups, which stay in float. Other such linears are an error.
        probed: Whether the row was made by running the layers (`haq_lab.models.generic`).
    """

    model_type: str
    layers: str
    groups: tuple[Group, ...]
    smoothquant_strength: float
    requires: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    moe: Moe | None = None
    head_norms: tuple[str, ...] = ()
    output_norms: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    learned_positions: str | None = None
    cached: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")
    attention: str = "self_attn"
    wrapper: str | None = None
    takes_prefix: bool = True
    head: str = "lm_head"
    in_float: tuple[str, ...] = ()
    probed: bool = False

    def unsupported(self, config: Any) -> list[tuple[str, tuple[Any, ...]]]:
        """Return the entries of `requires` that a transformers config does not meet."""
        return [(field, values) for field, values in self.requires if getattr(config, field) not in values]

    def experts(self, config: Any) -> int:
        """Return the number of experts in a layer, or 0 for a dense model."""
        return 0 if self.moe is None else self.moe.count(config)

    def moe_in(self, modules: Collection[str]) -> Moe | None:
        """Return the names of the router and the experts, or None if a layer with these modules has no experts."""
        return self.moe if self.moe is not None and self.moe.experts in modules else None

    def resolve(self, config: Any, modules: Collection[str]) -> tuple[Group, ...]:
        """Return the groups of a decoder layer with the placeholder `{e}` replaced by expert indices.

        Linears that the layer does not have are left out, because a model's layers may differ. If the experts compute
        the input, each expert gets its own group. Otherwise one group has the linears of all experts.

        Args:
            config: The model's transformers config.
            modules: Names of the layer's modules.
        """
        count = 0 if self.moe_in(modules) is None else self.experts(config)
        groups: list[Group] = []
        for group in (group.within(modules) for group in self.groups):
            if not group.consumers:
                continue
            if group.kind == "up" and "{e}" in group.consumers[0]:
                groups += [group.for_expert(number) for number in range(count)]
            else:
                shared = [name for name in group.consumers if "{e}" in name]
                others = [name for name in group.consumers if "{e}" not in name]
                expanded = [name.format(e=number) for number in range(count) for name in shared]
                groups.append(replace(group, consumers=(*others, *expanded)))
        return tuple(groups)

    def module_name(self, tensor: str) -> str:
        """Return the name in our modules of a tensor that is named as in a checkpoint."""
        tensor = tensor.replace(WRAPPED, "")
        for theirs, ours in (*self.renamed, *self._renamed_projections(tensor)):
            tensor = tensor.replace(theirs, ours)
        return tensor

    def checkpoint_name(self, tensor: str) -> str:
        """Return the name in checkpoints of a tensor that is named as in our modules."""
        for theirs, ours in (*self._renamed_projections(tensor), *reversed(self.renamed)):
            tensor = tensor.replace(ours, theirs)
        return tensor

    def _renamed_projections(self, tensor: str) -> list[tuple[str, str]]:
        """Return pairs as in `renamed` for a tensor of an expert, which a dense layer's linears must not match."""
        if self.moe is None or expert_of(tensor) is None:
            return []
        return [(f".{theirs}.", f".{ours}.") for theirs, ours in zip(self.moe.stored, PROJECTIONS, strict=True)]
