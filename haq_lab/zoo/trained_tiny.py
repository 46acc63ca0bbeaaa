"""A tiny Mixtral that has learnt something: distinct experts, learnt routing, minutes on a CPU.

Random experts show whether code is right; equal ones (`upcycle.py`) route like real text. Here both come
together: four layers of eight experts and a small vocabulary, trained on Python's own reference texts with
a load-balancing loss.

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
from haq_lab.utils.transformers_logging import quiet_transformers
from haq_lab.zoo.sanity_check import whole_model_facts

RATE, WARMUP, DECAY = 4e-3, 0.05, 0.1  # peak learning rate, share of the steps it rises, weight decay
BALANCE = 0.02  # weight of the load-balancing loss

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class TrainedTinyModel:
    """A Mixtral trained from nothing on Python's reference texts, once, and kept in the cache folder.

    Args:
        layers: Decoder layers.
        hidden: Width of the residual stream; a multiple of 32. An expert is twice as wide.
        experts: Experts a layer; a token takes two.
        vocabulary: Entries of the byte-level BPE tokenizer.
        steps: Training steps; 0 leaves the model as it is drawn.
        batch: Windows a step.
        seqlen: Tokens a window.
        seed: Of the weights and of the batches.
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
        """Lines on its perplexity and routing, beside the untrained model's."""
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"steps": 0}
        untrained = whole_model_facts(TrainedTinyModel(**settings).folder(), torch.float32)
        trained = whole_model_facts(self.folder(), torch.float32)
        return [*untrained.lines("untrained"), *trained.lines(f"after {self.steps} steps")]


def train(settings: TrainedTinyModel, target: Path) -> None:
    """Write the trained checkpoint and its tokenizer into the folder `target`."""
    text = python_docs("calibration")
    tokenizer = bpe_tokenizer(text, settings.vocabulary)
    tokens = encode(tokenizer, text)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), Progress() as progress:
        torch.manual_seed(settings.seed)
        model = MixtralForCausalLM(_config(settings, len(tokenizer)))
        if settings.steps:
            progress.layers(settings.steps, "train")
            _descend(model, tokens, settings, progress)
    with quiet_transformers():
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def bpe_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from `text`; it can read any other text too."""
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
    """Cross-entropy, and the load-balancing loss (Fedus et al., arXiv 2101.03961, eq. 4) of every layer by itself:
    transformers' own takes all layers as one, which lets an expert of a layer starve."""
    output = model(windows, output_router_logits=True, use_cache=False)
    targets = windows[:, 1:].flatten()
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets)
    experts, active = model.config.num_local_experts, model.config.num_experts_per_tok
    layers = [cast(Tensor, load_balancing_loss_func((one,), experts, active)) for one in output.router_logits]
    return loss + BALANCE * torch.stack(layers).mean()


def _descend(model: MixtralForCausalLM, tokens: Tensor, settings: TrainedTinyModel, progress: Progress) -> None:
    """AdamW on random windows; the rate rises, then falls along a cosine."""
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
