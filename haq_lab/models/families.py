"""The family table: the one place that knows an architecture.

For each one it says where the decoder layers are, which module's output feeds which linears (so what a
smoothing factor can be folded into), and where the experts are. A new dense architecture is one more row.

Names are relative to a decoder layer; `{e}` stands for an expert's number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from haq_lab.errors import UserError, nearest

FoldKind = Literal["norm", "value", "up"]


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, and the module whose output that tensor is.

    Dividing the source's output channels by s and multiplying the consumers' columns by s leaves the
    function as it is. The kind says how: a `norm` (weight and bias), the `value` projection (through the
    attention heads, s shared by the query heads of one key-value head), or the `up` projection (rows; the
    activation between is a product or positively homogeneous, so the factor passes through).

    `source` is None where nothing can be folded: the group is then only a shared input.
    """

    kind: FoldKind
    source: str | None
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture. `smoothquant_strength` is the alpha that SmoothQuant's authors published for it."""

    model_type: str
    layers: str
    groups: tuple[Group, ...]
    smoothquant_strength: float
    applies: Callable[[Any], bool] = lambda config: True

    def resolve(self, config: Any) -> tuple[Group, ...]:
        """The groups of one decoder layer, with the experts' names written out."""
        return self.groups


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
        f"model: this variant of '{config.model_type}' is not in the family table (haq_lab/models/families.py); "
        "its rows say which ones are"
    )


def refuse_unknown(model_type: object) -> None:
    """Raise `UserError` unless the table has an architecture of this name."""
    known = sorted({family.model_type for family in FAMILIES})
    if model_type not in known:
        raise UserError(
            f"model: architecture '{model_type}' is not in the family table (haq_lab/models/families.py), "
            f"which has {', '.join(known)}{nearest(model_type, known)}"
        )
