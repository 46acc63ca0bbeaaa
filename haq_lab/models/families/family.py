"""Describe one architecture: the linears that share an input, what takes a smoothing factor, and the experts.

Module names are relative to a decoder layer. `{e}` is a placeholder for the expert index.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from haq_lab.storage.tensor_names import expert_of

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
        """Return the index of the expert that contains the source, or None if it is outside the experts."""
        return None if self.source is None else expert_of(self.source)

    @property
    def site(self) -> str:
        """Return the module whose input hook sees the shared input of all tokens, whatever the routing."""
        return self.float_consumers[0] if self.float_consumers else self.consumers[0]

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


@dataclass(frozen=True)
class Moe:
    """The router and the experts of an MoE architecture: their module names and their config fields.

    The router returns logits (t, E), gate weights (t, k) and expert indices (t, k). The experts are called with the
    hidden states (t, d), the indices and the weights. `haq_lab.models.experts` splits fused experts. An expert's
    linears are named `PROJECTIONS`.

    Attributes:
        count_field: Config field with the number of experts in a layer.
        active_field: Config field with the number of active experts for each token, k.
        width_field: Config field with an expert's intermediate size.
        normalized_field: Config field that says whether a token's k gate weights are divided by their sum. None if
            they always are.
        router: Name of the router.
        experts: Name of the module list of the experts.
    """

    count_field: str
    active_field: str = "num_experts_per_tok"
    width_field: str = "intermediate_size"
    normalized_field: str | None = None
    router: str = "mlp.gate"
    experts: str = "mlp.experts"

    def count(self, config: Any) -> int:
        """Return the number of experts in a layer."""
        return getattr(config, self.count_field)

    def active(self, config: Any) -> int:
        """Return the number of active experts for each token, k."""
        return getattr(config, self.active_field)

    def width(self, config: Any) -> int:
        """Return the intermediate size of an expert."""
        return getattr(config, self.width_field)

    def is_normalized(self, config: Any) -> bool:
        """Return whether the k gate weights of a token are divided by their sum."""
        return self.normalized_field is None or bool(getattr(config, self.normalized_field))

    def linears(self, expert: int | str) -> tuple[str, str, str]:
        """Return the names of an expert's gate, up and down projections."""
        gate, up, down = (f"{self.experts}.{expert}.{name}" for name in PROJECTIONS)
        return gate, up, down

    @property
    def block(self) -> str:
        """Return the name of the MoE block, which contains both. The layer calls it with hidden states (b, t, d)."""
        return self.router.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: The `model_type` of the transformers config.
        layers: Name of the list of decoder layers in the model.
        groups: The linears of a layer, grouped by shared input.
        smoothquant_strength: The migration strength alpha that SmoothQuant's authors published for it.
        requires: Config fields with the values that the row supports. Other fields may have any value.
        moe: Names of the router and the experts. None for a dense model.
        head_norms: Names of the query and key norms between projection and rotary embedding. Empty for most models.
        output_norms: Names of the norms of what attention and MLP add to the residual stream. Empty for most models.
        renamed: Pairs of name parts: the part in checkpoints, and the part in our modules.
        learned_positions: Name of the table of learned positions in the model. None with rotary embeddings.
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

    @property
    def attention(self) -> str:
        """Return the name of the attention module within a layer."""
        return self.groups[0].consumers[0].rpartition(".")[0]

    def unsupported(self, config: Any) -> list[tuple[str, tuple[Any, ...]]]:
        """Return the entries of `requires` that a transformers config does not meet."""
        return [(field, values) for field, values in self.requires if getattr(config, field) not in values]

    def experts(self, config: Any) -> int:
        """Return the number of experts in a layer, or 0 for a dense model."""
        return 0 if self.moe is None else self.moe.count(config)

    def resolve(self, config: Any) -> tuple[Group, ...]:
        """Return the groups of one decoder layer with the placeholder `{e}` replaced by expert indices.

        If the source of a group is inside an expert, each expert gets its own group. Otherwise one group has the
        linears of all experts.

        Args:
            config: The model's transformers config.
        """
        count = self.experts(config)
        groups: list[Group] = []
        for group in self.groups:
            if group.source is not None and "{e}" in group.source:
                groups += [group.for_expert(number) for number in range(count)]
            else:
                shared = [name for name in group.consumers if "{e}" in name]
                others = [name for name in group.consumers if "{e}" not in name]
                expanded = [name.format(e=number) for number in range(count) for name in shared]
                groups.append(replace(group, consumers=(*others, *expanded)))
        return tuple(groups)

    def module_name(self, tensor: str) -> str:
        """Return the name in our modules of a tensor that is named as in a checkpoint."""
        for theirs, ours in self.renamed:
            tensor = tensor.replace(theirs, ours)
        return tensor

    def checkpoint_name(self, tensor: str) -> str:
        """Return the name in checkpoints of a tensor that is named as in our modules."""
        for theirs, ours in self.renamed:
            tensor = tensor.replace(ours, theirs)
        return tensor
