"""Build small random models of real architectures that run in milliseconds.

The weights have a larger standard deviation than usual, and a few norm weights are large. So the activations have
outlier channels, as in trained models.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from haq_lab.models.families.tiny import tiny_fields
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


def build_tiny(folder: Path, architecture: str, layers: int, hidden: int, seed: int) -> None:
    """Write a random checkpoint and its tokenizer to `folder`.

    Args:
        folder: An existing folder.
        architecture: A model type of `haq_lab.models.families.tiny`.
        layers: Number of decoder layers.
        hidden: Hidden size. A multiple of 32.
        seed: Seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(architecture, **tiny_fields(architecture, layers, hidden))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    outliers = torch.rand_like(parameter) < 0.05
                    parameter.copy_(torch.where(outliers, 12.0, 1.0) * (0.5 + torch.rand_like(parameter)))
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("bias"):  # corrects the choice of experts
                    buffer.normal_(std=0.1)
    with quiet_transformers():
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
