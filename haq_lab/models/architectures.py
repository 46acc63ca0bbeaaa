"""The family table: the one place that knows an architecture.

For each one it says where the decoder layers are, which module's output feeds which linears (so what a
smoothing factor can be folded into), and where the experts are. A new architecture is one more row.

Names are relative to a decoder layer; `{e}` stands for an expert's number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.errors import UserError, nearest

FoldKind = Literal["norm", "value", "up"]


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, and the module whose output that tensor is.

    Dividing the source's output channels by s and multiplying the consumers' columns by s leaves the
    function as it is. The kind says how: a `norm` (weight and bias), the `value` projection (through the
    attention heads, s shared by the query heads of one key-value head), or the `up` projection (rows; the
    activation between is a product or positively homogeneous, so the factor passes through).

    `source` is None where nothing can be folded: the group is then only a shared input.

    `float_consumers` read the tensor too, so their columns take the factor, but they stay in full precision:
    the router of a Mixture-of-Experts layer.
    """

    kind: FoldKind
    source: str | None
    consumers: tuple[str, ...]
    float_consumers: tuple[str, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """All that read the tensor."""
        return self.consumers + self.float_consumers

    @property
    def expert(self) -> int | None:
        """The expert that the tensor lies within; None for one that every token has."""
        return None if self.source is None else expert_of(self.source)

    @property
    def site(self) -> str:
        """The module at whose input the tensor is seen, whatever the routing."""
        return self.float_consumers[0] if self.float_consumers else self.consumers[0]

    def parts(self) -> dict[int | None, tuple[str, ...]]:
        """The consumers by the expert that they belong to; None for those of no expert."""
        parts: dict[int | None, tuple[str, ...]] = {}
        for name in self.consumers:
            parts[expert_of(name)] = (*parts.get(expert_of(name), ()), name)
        return parts

    def for_expert(self, number: int) -> Group:
        """The group with an expert's number written in."""
        source = self.source and self.source.format(e=number)
        return replace(self, source=source, consumers=tuple(name.format(e=number) for name in self.consumers))


@dataclass(frozen=True)
class Moe:
    """Where a decoder layer has its router and its experts, and under which name the config counts them.

    The router returns (logits, gate weights (t, k), expert numbers (t, k)); the experts are called with the
    hidden states (t, d), the numbers and the weights. `haq_lab.models.experts` unfuses them.
    """

    count: str
    router: str = "mlp.gate"
    experts: str = "mlp.experts"

    @property
    def block(self) -> str:
        """The module of both, which the layer calls with its hidden states (b, t, d)."""
        return self.router.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        smoothquant_strength: The alpha that SmoothQuant's authors published for it.
        moe: Where the experts are; None for a dense model.
        head_norms: The norms of queries and of keys between their projections and the rotation; none in most.
        renamed: Parts of tensors' names, as checkpoints write them and as our modules have them.
    """

    model_type: str
    layers: str
    groups: tuple[Group, ...]
    smoothquant_strength: float
    applies: Callable[[Any], bool] = lambda config: True
    moe: Moe | None = None
    head_norms: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def experts(self, config: Any) -> int:
        """How many experts a layer has; 0 for a dense model."""
        return 0 if self.moe is None else getattr(config, self.moe.count)

    def resolve(self, config: Any) -> tuple[Group, ...]:
        """The groups of one decoder layer, with the experts' names written out.

        A group whose source is within an expert becomes one for each; elsewhere all experts' linears share it.
        """
        count = self.experts(config)
        groups: list[Group] = []
        for group in self.groups:
            if group.source is not None and "{e}" in group.source:
                groups += [group.for_expert(number) for number in range(count)]
            else:
                shared = [name for name in group.consumers if "{e}" in name]
                others = [name for name in group.consumers if "{e}" not in name]
                written = [name.format(e=number) for number in range(count) for name in shared]
                groups.append(replace(group, consumers=(*others, *written)))
        return tuple(groups)

    def module_name(self, tensor: str) -> str:
        """A checkpoint's name for a tensor -> the name that it has in our modules."""
        for theirs, ours in self.renamed:
            tensor = tensor.replace(theirs, ours)
        return tensor

    def checkpoint_name(self, tensor: str) -> str:
        """The name in our modules -> the one that checkpoints of this architecture use."""
        for theirs, ours in self.renamed:
            tensor = tensor.replace(ours, theirs)
        return tensor


def _attention(norm: str | None, output: str) -> tuple[Group, ...]:
    queries = tuple(f"self_attn.{name}_proj" for name in "qkv")
    return (
        Group("norm", norm, queries),
        Group("value", "self_attn.v_proj", (f"self_attn.{output}",)),
    )


_GATED_MLP = (
    Group("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Group("up", "mlp.up_proj", ("mlp.down_proj",)),
)


_LLAMA_GROUPS = (*_attention("input_layernorm", "o_proj"), *_GATED_MLP)


_RELU_MLP = Group("up", "fc1", ("fc2",))


_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


_EXPERT_INPUTS = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj")


_MOE_MLP = (
    Group("norm", "post_attention_layernorm", _EXPERT_INPUTS, float_consumers=("mlp.gate",)),
    Group("up", "mlp.experts.{e}.up_proj", ("mlp.experts.{e}.down_proj",)),
)


_MOE_GROUPS = (*_attention("input_layernorm", "o_proj"), *_MOE_MLP)


FAMILIES: tuple[Family, ...] = (
    Family(
        "opt",
        "model.decoder.layers",
        (
            *_attention("self_attn_layer_norm", "out_proj"),
            Group("norm", "final_layer_norm", ("fc1",)),
            _RELU_MLP,
        ),
        smoothquant_strength=0.5,
        applies=lambda config: (
            config.do_layer_norm_before
            and config.layer_norm_elementwise_affine
            and config.activation_function == "relu"
        ),
    ),
    # OPT-350M normalises after the residual sum: its norms also feed the residual, so none can be folded. Nor can
    # norms without weights.
    Family(
        "opt",
        "model.decoder.layers",
        (*_attention(None, "out_proj"), Group("norm", None, ("fc1",)), _RELU_MLP),
        smoothquant_strength=0.5,
        applies=lambda config: config.activation_function == "relu",
    ),
    Family("llama", "model.layers", _LLAMA_GROUPS, smoothquant_strength=0.85),
    Family("mistral", "model.layers", _LLAMA_GROUPS, smoothquant_strength=0.8),
    Family(
        "mixtral",
        "model.layers",
        _MOE_GROUPS,
        smoothquant_strength=0.8,
        moe=Moe("num_local_experts"),
        renamed=(
            (".block_sparse_moe.", ".mlp."),
            (".w1.", ".gate_proj."),
            (".w3.", ".up_proj."),
            (".w2.", ".down_proj."),
        ),
    ),
    # Of the next two SmoothQuant's authors published no strength: Mixtral's stands in.
    Family(
        "qwen3_moe",
        "model.layers",
        _MOE_GROUPS,
        smoothquant_strength=0.8,
        applies=lambda config: (
            not config.mlp_only_layers and config.decoder_sparse_step == 1
        ),  # no dense layers between
        moe=Moe("num_experts"),
        head_norms=_HEAD_NORMS,
    ),
    # Clipped values don't let a factor pass.
    Family(
        "olmoe",
        "model.layers",
        _MOE_GROUPS,
        smoothquant_strength=0.8,
        applies=lambda config: config.clip_qkv is None,
        moe=Moe("num_experts"),
        head_norms=_HEAD_NORMS,
    ),
)


def family_of(config: Any) -> Family:
    """The first row that fits a transformers config.

    Raises `UserError` where the table has none: quantizing by guesswork would skip layers in silence.
    """
    refuse_unknown(config.model_type)
    for family in FAMILIES:
        if family.model_type == config.model_type and family.applies(config):
            return family
    raise UserError(
        f"model: this variant of '{config.model_type}' is not in the family table (haq_lab/models/architectures.py); "
        "its rows say which ones are"
    )


def refuse_unknown(model_type: object) -> None:
    """Raise `UserError` unless the table has an architecture of this name."""
    known = sorted({family.model_type for family in FAMILIES})
    if model_type not in known:
        raise UserError(
            f"model: architecture '{model_type}' is not in the family table (haq_lab/models/architectures.py), "
            f"which has {', '.join(known)}{nearest(model_type, known)}"
        )
