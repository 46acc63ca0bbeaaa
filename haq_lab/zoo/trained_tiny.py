"""Train a tiny Mixtral in minutes on a CPU. Its experts differ and its routing is learnt.

The default has four layers, eight experts and a small vocabulary. It is trained on Python's reference texts with a
load-balancing loss. In contrast, `random_tiny.py` has random routing, and the experts of `upcycle.py` are equal.

    python -m haq_lab.models build tiny_mixtral_trained
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from haq_lab.data.text import fingerprint, python_docs
from haq_lab.data.windows import encode
from haq_lab.models.build_cache import build_once
from haq_lab.models.random_tiny import END
from haq_lab.utils.console import Progress
from haq_lab.utils.hugging_face import quiet_transformers
from haq_lab.zoo.sanity_check import check_model

RATE, WARMUP, DECAY = 4e-3, 0.05, 0.1  # peak learning rate, share of warm-up steps, weight decay
BALANCE = 0.02  # weight of the load-balancing loss

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class TrainedTinyModel:
    """A small Mixtral trained from scratch on Python's reference texts, once, and stored in the cache folder.

    Args:
        layers: Number of decoder layers.
        hidden: Hidden size. A multiple of 32. The experts' intermediate size is twice this.
        experts: Number of experts in a layer. Two of them are active for each token.
        vocabulary: Vocabulary size of the byte-level BPE tokenizer.
        steps: Number of training steps. With 0, the weights stay random.
        batch: Number of windows in a training step.
        seqlen: Number of tokens in a window.
        seed: Seed of the weights and of the batches.
    """

    layers: Positive = 4
    hidden: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    experts: Annotated[int, Field(ge=2)] = 8
    vocabulary: Annotated[int, Field(ge=257)] = 1024
    steps: Annotated[int, Field(ge=0)] = 400
    batch: Positive = 16
    seqlen: Annotated[int, Field(ge=2)] = 128
    seed: int = 0

    @property
    def label(self) -> str:
        return "tiny_mixtral_trained"

    def folder(self) -> Path:
        sizes = f"{self.layers}x{self.hidden}-{self.experts}-{self.vocabulary}"
        text = fingerprint(python_docs("calibration"))[:8]
        name = f"{self.label}-{sizes}-{self.steps}x{self.batch}x{self.seqlen}-{text}-{self.seed}"
        return build_once(name, lambda target: train(self, target))

    def check(self) -> list[str]:
        """Return lines of text with perplexity and routing of the untrained and the trained model."""
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"steps": 0}
        untrained = check_model(TrainedTinyModel(**settings).folder(), torch.float32)
        trained = check_model(self.folder(), torch.float32)
        return [*untrained.lines("untrained"), *trained.lines(f"after {self.steps} steps")]


def train(settings: TrainedTinyModel, target: Path) -> None:
    """Train the model and write the checkpoint and its tokenizer to the existing folder `target`."""
    text = python_docs("calibration")
    tokenizer = bpe_tokenizer(text, settings.vocabulary)
    tokens = encode(tokenizer, text)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), Progress() as progress:
        torch.manual_seed(settings.seed)
        model = MixtralForCausalLM(_config(settings, len(tokenizer)))
        if settings.steps:
            progress.layers(settings.steps, "train")
            _run_steps(model, tokens, settings, progress)
    with quiet_transformers():
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def bpe_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `text`. It can encode any text.

    Args:
        text: Training text.
        vocabulary: Vocabulary size, at least 257.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _config(settings: TrainedTinyModel, vocabulary: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_local_experts=settings.experts,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _loss(model: MixtralForCausalLM, windows: Tensor) -> Tensor:
    """Return the cross-entropy plus the load-balancing loss (Fedus et al., arXiv 2101.03961, eq. 4).

    The load-balancing loss is computed for each layer. transformers pools all layers, so single experts of a layer
    could stay unused.
    """
    output = model(windows, output_router_logits=True, use_cache=False)
    targets = windows[:, 1:].flatten()
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets)
    experts, active = model.config.num_local_experts, model.config.num_experts_per_tok
    layers = [cast(Tensor, load_balancing_loss_func((logits,), experts, active)) for logits in output.router_logits]
    return loss + BALANCE * torch.stack(layers).mean()


def _run_steps(model: MixtralForCausalLM, tokens: Tensor, settings: TrainedTinyModel, progress: Progress) -> None:
    """Train with AdamW on random windows, with linear warm-up and cosine decay of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    warmup = max(1, round(WARMUP * settings.steps))

    def rate(step: int) -> float:
        done = (step - warmup) / max(1, settings.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for _ in range(settings.steps):
        starts = torch.randint(0, len(tokens) - settings.seqlen, (settings.batch,))
        windows = torch.stack([tokens[start : start + settings.seqlen] for start in starts])
        _loss(model, windows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.layer_done()
    model.eval()
