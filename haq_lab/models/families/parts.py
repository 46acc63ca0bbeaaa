"""The groups of linears that several architectures share."""

from __future__ import annotations

from haq_lab.models.families.family import Group

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def attention(norm: str | None, output: str = "o_proj", gain_offset: float = 0.0) -> tuple[Group, ...]:
    """Return the groups of an attention module with three input projections.

    Args:
        norm: Name of the norm before it, or None if nothing folds into it.
        output: Last part of the name of the output projection.
        gain_offset: As in `Group`.
    """
    queries = tuple(f"self_attn.{name}_proj" for name in "qkv")
    return (
        Group("norm", norm, queries, gain_offset=gain_offset),
        Group("value", "self_attn.v_proj", (f"self_attn.{output}",)),
    )


def gated_mlp(norm: str | None = "post_attention_layernorm", gain_offset: float = 0.0) -> tuple[Group, ...]:
    """Return the groups of an MLP with a gate. The arguments are those of `attention`."""
    return (
        Group("norm", norm, ("mlp.gate_proj", "mlp.up_proj"), gain_offset=gain_offset),
        Group("up", "mlp.up_proj", ("mlp.down_proj",)),
    )


# One linear computes queries, keys and values, in this order. Another one computes gate and up.
FUSED_ATTENTION = (
    Group("norm", "input_layernorm", ("self_attn.qkv_proj",)),
    Group("value", "self_attn.qkv_proj", ("self_attn.o_proj",), fused=True),
)
FUSED_MLP = (
    Group("norm", "post_attention_layernorm", ("mlp.gate_up_proj",)),
    Group("up", "mlp.gate_up_proj", ("mlp.down_proj",), fused=True),
)
