"""The groups of linears that several architectures share."""

from __future__ import annotations

from haq_lab.models.families.family import Group

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def attention(norm: str | None, output: str) -> tuple[Group, ...]:
    """Return the groups of an attention module, given its norm (None if nothing folds) and its output projection."""
    queries = tuple(f"self_attn.{name}_proj" for name in "qkv")
    return (
        Group("norm", norm, queries),
        Group("value", "self_attn.v_proj", (f"self_attn.{output}",)),
    )


GATED_MLP = (
    Group("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Group("up", "mlp.up_proj", ("mlp.down_proj",)),
)
