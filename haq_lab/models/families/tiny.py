"""The configs of the small random models: one for each architecture of the family table.

Their dimensions are odd where the architecture allows it: one key-value head, heads whose width is not the hidden size
over the heads, windows shorter than a text, and multipliers that are not 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]  # of a transformers config


SOFT_CAPS: Fields = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}
MULTIPLIERS: Fields = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
}


def _gated(hidden: int, key_values: int = 2) -> Fields:
    return {"intermediate_size": 3 * hidden // 2, "num_key_value_heads": key_values}


def _gemma(hidden: int, layers: int, key_values: int) -> Fields:
    """Return the fields of a Gemma in which every second layer has a sliding window."""
    return _gated(hidden, key_values) | {
        "head_dim": hidden // 2,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "layer_types": [("sliding_attention", "full_attention")[index % 2] for index in range(layers)],
    }


YARN: Fields = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}


def _experts(hidden: int, **fields: Any) -> Fields:
    """Return the fields of a Mixture of Experts whose experts are narrower than a dense MLP."""
    experts = {"moe_intermediate_size": hidden // 2, "num_experts_per_tok": 2}
    return _gated(hidden) | experts | fields


def _deepseek(hidden: int, **fields: Any) -> Fields:
    """Return the fields of a model with a dense first layer, shared experts and groups of experts."""
    routed = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
    return _experts(hidden, first_k_dense_replace=1, n_group=4, topk_group=2) | routed | fields


def _delta_net(hidden: int, layers: int) -> Fields:
    """Return the fields of a model with linear attention in every second layer."""
    return {
        "head_dim": hidden // 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": hidden // 8,
        "linear_value_head_dim": 3 * hidden // 16,
        "layer_types": [("linear_attention", "full_attention")[index % 2] for index in range(layers)],
    }


LATENT: Fields = {  # widths that are not powers of two, but multiples of 16
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
}

# By model type: the fields that differ from `shared_fields`, given the hidden size and the number of layers.
TINY: dict[str, Callable[[int, int], Fields]] = {
    "opt": lambda hidden, layers: {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "init_std": 0.1},
    "llama": lambda hidden, layers: {
        "intermediate_size": 5 * hidden // 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "mistral": lambda hidden, layers: _gated(hidden) | {"sliding_window": 24},
    "qwen2": lambda hidden, layers: _gated(hidden) | {"tie_word_embeddings": True},
    "qwen3": lambda hidden, layers: _gated(hidden, key_values=1) | {"head_dim": hidden // 2},
    "gemma2": lambda hidden, layers: _gemma(hidden, layers, key_values=2) | SOFT_CAPS,
    "gemma3_text": lambda hidden, layers: _gemma(hidden, layers, key_values=1),
    "phi3": lambda hidden, layers: _gated(hidden),
    "olmo2": lambda hidden, layers: _gated(hidden),
    "smollm3": lambda hidden, layers: _gated(hidden) | {"no_rope_layer_interval": 2},
    "granite": lambda hidden, layers: _gated(hidden) | MULTIPLIERS,
    "glm4": lambda hidden, layers: _gated(hidden) | {"head_dim": hidden // 2},
    "starcoder2": lambda hidden, layers: _gated(hidden) | {"sliding_window": 24},
    "stablelm": lambda hidden, layers: _gated(hidden) | {"use_qkv_bias": True},
    "mixtral": lambda hidden, layers: _gated(hidden) | {"num_experts_per_tok": 2, "num_local_experts": 8},
    "qwen3_moe": lambda hidden, layers: {
        "moe_intermediate_size": hidden // 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "num_experts": 16,
        "norm_topk_prob": True,
    },
    "olmoe": lambda hidden, layers: {
        "intermediate_size": hidden // 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "num_experts": 16,
    },
    "qwen2_moe": lambda hidden, layers: _experts(
        hidden, num_experts=6, shared_expert_intermediate_size=2 * hidden, decoder_sparse_step=2
    ),
    "deepseek_v2": lambda hidden, layers: (
        _deepseek(hidden, topk_method="group_limited_greedy", q_lora_rank=None) | LATENT
    ),
    "deepseek_v3": lambda hidden, layers: _deepseek(hidden, norm_topk_prob=True, q_lora_rank=80) | LATENT,
    "glm4_moe": lambda hidden, layers: _deepseek(
        hidden, n_shared_experts=1, head_dim=hidden // 4, use_qk_norm=True, attention_bias=True
    ),
    "gpt_oss": lambda hidden, layers: (
        _gated(hidden)
        | {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": hidden // 4,
            "sliding_window": 24,
            "rope_parameters": YARN,
        }
    ),
    "granitemoe": lambda hidden, layers: (
        _gated(hidden)
        | MULTIPLIERS
        | {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        }
    ),
    "phimoe": lambda hidden, layers: (
        _gated(hidden)
        | {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
        }
    ),
    "qwen3_next": lambda hidden, layers: (
        _experts(hidden, num_experts=6, shared_expert_intermediate_size=hidden, norm_topk_prob=True)
        | _delta_net(hidden, layers)
    ),
    "qwen3_5_moe_text": lambda hidden, layers: (
        _experts(hidden, num_experts=6, shared_expert_intermediate_size=hidden) | _delta_net(hidden, layers)
    ),
    "gemma4_text": lambda hidden, layers: (
        _gemma(hidden, layers, key_values=2)
        | {
            "hidden_size_per_layer_input": 0,
            "global_head_dim": hidden,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": hidden // 2,
            "final_logit_softcapping": 8.0,
        }
    ),
    "lfm2_moe": lambda hidden, layers: _experts(
        hidden,
        num_experts=6,
        num_dense_layers=1,
        layer_types=[("conv", "full_attention")[index % 2] for index in range(layers)],
    ),
}


def tiny_fields(architecture: str, layers: int, hidden: int) -> Fields:
    """Return the fields of the transformers config of a small random model.

    Args:
        architecture: A model type of `TINY`.
        layers: Number of decoder layers.
        hidden: Hidden size. A multiple of 32.
    """
    return {
        "vocab_size": 257,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    } | TINY[architecture](hidden, layers)
