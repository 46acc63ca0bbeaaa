"""What can be said about a model that was made here: perplexity by transformers' own code, and how it routes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from haq_lab.data.windows import PythonDocs
from haq_lab.utils.transformers_logging import quiet_transformers

WINDOWS, SEQLEN = 4, 1024


@dataclass(frozen=True)
class Facts:
    """Args:
    perplexity: On Python's reference texts, 4 windows of at most 1,024 tokens.
    shares: By layer and expert, the share of tokens whose first choice it is (empty for a dense model).
    repeats: By layer, how often a token's first choice is the previous token's.
    """

    perplexity: float
    shares: list[list[float]]
    repeats: list[float]

    def lines(self, name: str) -> list[str]:
        """For people."""
        told = [f"{name}: perplexity {self.perplexity:.4f}"]
        if self.shares:
            low, high = min(map(min, self.shares)), max(map(max, self.shares))
            told.append(f"{name}: an expert is a token's first choice in {low:.1%} to {high:.1%} of cases")
            low, high = min(self.repeats), max(self.repeats)
            told.append(f"{name}: the previous token's first choice again in {low:.1%} to {high:.1%} (by layer)")
        return told


@torch.no_grad()
def whole_model_facts(folder: Path, dtype: torch.dtype) -> Facts:
    """Facts of a checkpoint with its weights rounded to `dtype`, computed in float32, the whole model in memory."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    seqlen = min(SEQLEN, model.config.max_position_embeddings)
    windows = PythonDocs(WINDOWS, seqlen).load(tokenizer).tokens
    sparse = hasattr(model.config, "num_local_experts")
    options = {"output_router_logits": True} if sparse else {}
    nll = 0.0
    choices: list[Tensor] = []
    for window in windows:
        output = model(window[None], use_cache=False, **options)
        nll += float(F.cross_entropy(output.logits[0, :-1], window[1:], reduction="sum"))
        if sparse:
            choices.append(torch.stack([layer.argmax(-1) for layer in output.router_logits]))
    perplexity = math.exp(nll / (len(windows) * (seqlen - 1)))
    if not sparse:
        return Facts(perplexity, [], [])
    first = torch.stack(choices, dim=1)  # (layers, windows, t)
    shares = F.one_hot(first.flatten(1), model.config.num_local_experts).float().mean(1)
    repeats = (first[..., 1:] == first[..., :-1]).float().mean((1, 2))
    return Facts(perplexity, shares.tolist(), repeats.tolist())
