"""Build small random models of real architectures that run in milliseconds.

The weights have a larger standard deviation than usual, and a few norm weights are large. So the activations have
outlier channels, as in trained models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from haq_lab.utils.hugging_face import quiet_transformers

END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with 257 tokens: one for each byte, and an end token. It can encode any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{symbol: number for number, symbol in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _config(architecture: str, layers: int, hidden: int) -> PreTrainedConfig:
    shared: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    if architecture == "opt":
        return OPTConfig(**shared, ffn_dim=4 * hidden, word_embed_proj_dim=hidden, init_std=0.1)
    if architecture == "llama":
        return LlamaConfig(**shared, intermediate_size=5 * hidden // 2, num_key_value_heads=2, tie_word_embeddings=True)
    shared |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
    if architecture == "mixtral":
        return MixtralConfig(**shared, intermediate_size=3 * hidden // 2, num_local_experts=8)
    if architecture == "qwen3_moe":
        return Qwen3MoeConfig(**shared, moe_intermediate_size=hidden // 2, num_experts=16, norm_topk_prob=True)
    return OlmoeConfig(**shared, intermediate_size=hidden // 2, num_experts=16)


def build_tiny(folder: Path, architecture: str, layers: int, hidden: int, seed: int) -> None:
    """Write a random checkpoint and its tokenizer to `folder`.

    Args:
        folder: An existing folder.
        architecture: A model type: opt, llama, mixtral, qwen3_moe or olmoe.
        layers: Number of decoder layers.
        hidden: Hidden size. A multiple of 32.
        seed: Seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            _config(architecture, layers, hidden), dtype=torch.float32, trust_remote_code=False
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    outliers = torch.rand_like(parameter) < 0.05
                    parameter.copy_(torch.where(outliers, 12.0, 1.0) * (0.5 + torch.rand_like(parameter)))
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
    with quiet_transformers():
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
