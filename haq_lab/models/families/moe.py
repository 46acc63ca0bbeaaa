"""The rows of the Mixtures of Experts.

A row lists the linears of all kinds of layers of its architecture: dense layers, layers with experts, and layers with
other modules in place of attention. SmoothQuant's authors published a strength for Mixtral only, so all rows use it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haq_lab.models.families.family import Family, Group, Moe
from haq_lab.models.families.parts import HEAD_NORMS, attention, gated_mlp

STRENGTH = 0.8
W1_W3_W2 = ("w1", "w3", "w2")


def experts(
    moe: Moe,
    norm: str = "post_attention_layernorm",
    shared: str | None = None,
    shared_gate: str | None = None,
    folds_up: bool = True,
    gain_offset: float = 0.0,
    routed_apart: bool = False,
) -> tuple[Group, ...]:
    """Return the groups of a block of experts.

    Args:
        moe: Names of the router and the experts.
        norm: Name of the norm before the block.
        shared: Name of the shared expert, an MLP that every token uses. None if there is none.
        shared_gate: Name of the linear that computes the weight of the shared expert. None if the weight is 1.
        folds_up: Whether a factor can be folded into the experts' up projections.
        gain_offset: As in `Group`.
        routed_apart: Whether the router has another input than the experts.
    """
    gate, up, down = moe.linears("{e}")
    inner = () if shared is None else (Group("up", f"{shared}.up_proj", (f"{shared}.down_proj",)),)
    readers = () if shared is None else (f"{shared}.gate_proj", f"{shared}.up_proj")
    in_float = (*(() if routed_apart else (moe.router,)), *(() if shared_gate is None else (shared_gate,)))
    return (
        Group("norm", norm, (*readers, gate, up), in_float, gain_offset),
        *inner,
        Group("up", up if folds_up else None, (down,)),
    )


ATTENTION = attention("input_layernorm")

# Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). Queries may be compressed too.
LATENT_ATTENTION = (
    Group("norm", "input_layernorm", tuple(f"self_attn.{n}" for n in ("q_proj", "q_a_proj", "kv_a_proj_with_mqa"))),
    Group("norm", "self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
    Group("norm", "self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
    Group("value", "self_attn.kv_b_proj", ("self_attn.o_proj",)),
)

# Linear attention (Gated DeltaNet) in most layers. Its small projections of decay and step stay in float.
DELTA_NET = tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "qkvz"))
HYBRID_ATTENTION = (
    Group(
        "norm",
        "input_layernorm",
        (*(f"self_attn.{name}_proj" for name in "qkv"), *DELTA_NET),
        tuple(f"linear_attn.in_proj_{name}" for name in ("b", "a", "ba")),
        gain_offset=1.0,
    ),
    Group("value", "self_attn.v_proj", ("self_attn.o_proj",)),
    Group("up", None, ("linear_attn.out_proj",)),
)
SHARED: dict[str, Any] = {"shared": "mlp.shared_expert", "shared_gate": "mlp.shared_expert_gate"}

_MIXTRAL = Moe("num_local_experts", stored=W1_W3_W2)
_QWEN_MOE = Moe("num_experts", width_field="moe_intermediate_size", normalized_field="norm_topk_prob")
_OLMOE = Moe("num_experts", normalized_field="norm_topk_prob")
_DEEPSEEK = Moe("n_routed_experts", width_field="moe_intermediate_size", normalized_field="norm_topk_prob")
_GRANITE = Moe("num_local_experts", router="block_sparse_moe.router", experts="block_sparse_moe.experts", fused=True)
_PHI = Moe("num_local_experts", router="mlp.router", stored=W1_W3_W2)
_GPT_OSS = Moe("num_local_experts", router="mlp.router", fused=True)
_GEMMA = Moe(
    "num_experts",
    active_field="top_k_experts",
    width_field="moe_intermediate_size",
    router="router",
    experts="experts",
    fused=True,
)
_LFM2 = Moe(
    "num_experts",
    width_field="moe_intermediate_size",
    normalized_field="norm_topk_prob",
    router="feed_forward.gate",
    experts="feed_forward.experts",
    router_buffers=("feed_forward.expert_bias",),
    stored=W1_W3_W2,
)


def _row(model_type: str, groups: tuple[Group, ...], moe: Moe, **others: Any) -> Family:
    return Family(model_type, "model.layers", groups, moe=moe, smoothquant_strength=STRENGTH, **others)


MIXTURES: tuple[Family, ...] = (
    _row(
        "mixtral",
        (*ATTENTION, *experts(_MIXTRAL)),
        _MIXTRAL,
        renamed=((".block_sparse_moe.", ".mlp."),),
    ),
    _row(
        "qwen3_moe",
        (*ATTENTION, *gated_mlp(), *experts(_QWEN_MOE)),
        _QWEN_MOE,
        head_norms=HEAD_NORMS,
    ),
    # With clip_qkv, values are clipped, so a factor cannot be folded through them.
    _row(
        "olmoe",
        (*ATTENTION, *experts(_OLMOE)),
        _OLMOE,
        requires=(("clip_qkv", (None,)),),
        head_norms=HEAD_NORMS,
    ),
    _row(
        "qwen2_moe",
        (
            *ATTENTION,
            *gated_mlp(),
            *experts(_QWEN_MOE, **SHARED),
        ),
        _QWEN_MOE,
    ),
    *(
        _row(
            model_type,
            (*LATENT_ATTENTION, *gated_mlp(), *experts(_DEEPSEEK, shared="mlp.shared_experts")),
            _DEEPSEEK,
            takes_prefix=False,
            cached=("self_attn.kv_a_proj_with_mqa",),
        )
        for model_type in ("deepseek_v2", "deepseek_v3")
    ),
    _row(
        "glm4_moe",
        (*ATTENTION, *gated_mlp(), *experts(_DEEPSEEK, shared="mlp.shared_experts")),
        _DEEPSEEK,
        head_norms=HEAD_NORMS,
    ),
    # The clamped SwiGLU of the experts is not linear in the up projection's output.
    _row(
        "gpt_oss",
        (*ATTENTION, *experts(_GPT_OSS, folds_up=False)),
        _GPT_OSS,
        takes_prefix=False,
    ),
    _row(
        "granitemoe",
        (*ATTENTION, *experts(_GRANITE)),
        _GRANITE,
        renamed=(
            (".input_linear.weight", ".experts.gate_up_proj"),
            (".output_linear.weight", ".experts.down_proj"),
            (".router.layer.weight", ".router.weight"),
        ),
    ),
    _row(
        "phimoe",
        (*ATTENTION, *experts(_PHI)),
        _PHI,
        renamed=((".block_sparse_moe.", ".mlp."), (".mlp.gate.", ".mlp.router.")),
    ),
    *(
        _row(
            model_type,
            (*HYBRID_ATTENTION, *gated_mlp(gain_offset=1.0), *experts(moe, gain_offset=1.0, **SHARED)),
            moe,
            head_norms=HEAD_NORMS,
            wrapper=wrapper,
            takes_prefix=False,
        )
        for model_type, wrapper, moe in (
            ("qwen3_next", None, _QWEN_MOE),
            ("qwen3_5_moe_text", "qwen3_5_moe", replace(_QWEN_MOE, normalized_field=None)),
        )
    ),
    # Router, experts and MLP each have their own norm. Values are normalised, so nothing folds into their projection.
    _row(
        "gemma4_text",
        (
            attention("input_layernorm")[0],
            Group("value", None, ("self_attn.o_proj",)),
            *gated_mlp("pre_feedforward_layernorm"),
            *experts(_GEMMA, "pre_feedforward_layernorm_2", routed_apart=True),
        ),
        _GEMMA,
        requires=(
            ("hidden_size_per_layer_input", (0,)),
            ("num_kv_shared_layers", (0,)),
            ("use_bidirectional_attention", (None, "vision")),
        ),
        head_norms=HEAD_NORMS,
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        wrapper="gemma4",
        takes_prefix=False,
        in_float=("router.proj",),
    ),
    # Most layers have a short convolution in place of attention. Its linears are quantised. The last rows of its input
    # projection are what is convolved, so its output is linear in them.
    _row(
        "lfm2_moe",
        (
            Group("norm", "operator_norm", (*(f"self_attn.{name}_proj" for name in "qkv"), "conv.in_proj")),
            Group("value", "self_attn.v_proj", ("self_attn.out_proj",)),
            Group("up", "conv.in_proj", ("conv.out_proj",), fused=True),
            Group("norm", "ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
            Group("up", "feed_forward.w3", ("feed_forward.w2",)),
            *experts(_LFM2, norm="ffn_norm"),
        ),
        _LFM2,
        requires=(("use_expert_bias", (True,)), ("conv_bias", (False,))),
        head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        takes_prefix=False,
    ),
)
