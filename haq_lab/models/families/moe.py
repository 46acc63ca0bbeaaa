"""The rows of the Mixtures of Experts."""

from __future__ import annotations

from haq_lab.models.families.family import Family, Moe
from haq_lab.models.families.parts import HEAD_NORMS, moe_groups

_MIXTRAL = Moe("num_local_experts")
_QWEN3_MOE = Moe("num_experts", width_field="moe_intermediate_size", normalized_field="norm_topk_prob")
_OLMOE = Moe("num_experts", normalized_field="norm_topk_prob")

MIXTURES: tuple[Family, ...] = (
    Family(
        "mixtral",
        "model.layers",
        moe_groups(_MIXTRAL),
        smoothquant_strength=0.8,
        moe=_MIXTRAL,
        renamed=(
            (".block_sparse_moe.", ".mlp."),
            (".w1.", ".gate_proj."),
            (".w3.", ".up_proj."),
            (".w2.", ".down_proj."),
        ),
    ),
    # SmoothQuant's authors published no strength for the next two, so they use Mixtral's.
    Family(
        "qwen3_moe",
        "model.layers",
        moe_groups(_QWEN3_MOE),
        smoothquant_strength=0.8,
        requires=(("mlp_only_layers", ([], None)), ("decoder_sparse_step", (1,))),  # every layer must be an MoE layer
        moe=_QWEN3_MOE,
        head_norms=HEAD_NORMS,
    ),
    # With clip_qkv, values are clipped, so a factor cannot be folded through them.
    Family(
        "olmoe",
        "model.layers",
        moe_groups(_OLMOE),
        smoothquant_strength=0.8,
        requires=(("clip_qkv", (None,)),),
        moe=_OLMOE,
        head_norms=HEAD_NORMS,
    ),
)
