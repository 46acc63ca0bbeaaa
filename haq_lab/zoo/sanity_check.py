"""Measure a built model with transformers alone: its perplexity and its routing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from haq_lab.data.windows import PythonDocs
from haq_lab.models.families.lookup import family_of
from haq_lab.utils.hugging_face import quiet_transformers

WINDOWS, SEQLEN = 4, 1024


@dataclass(frozen=True)
class ModelCheck:
    """Perplexity and routing of a model on four windows of at most 1,024 tokens of Python's reference texts.

    Attributes:
        perplexity: Perplexity.
        shares: For each layer and expert, the share of tokens that rank the expert first. Empty for a dense model.
        repeats: For each layer, the share of tokens that rank the same expert first as the previous token. Empty for
            a dense model.
    """

    perplexity: float
    shares: list[list[float]]
    repeats: list[float]

    def lines(self, name: str) -> list[str]:
        """Return the results as lines of text that begin with `name`."""
        lines = [f"{name}: perplexity {self.perplexity:.4f}"]
        if self.shares:
            low, high = min(map(min, self.shares)), max(map(max, self.shares))
            lines.append(f"{name}: each expert is the first choice of {low:.1%} to {high:.1%} of the tokens of a layer")
            low, high = min(self.repeats), max(self.repeats)
            lines.append(
                f"{name}: {low:.1%} to {high:.1%} of the tokens of a layer repeat the previous token's first choice"
            )
        return lines


@torch.no_grad()
def check_model(folder: Path, dtype: torch.dtype) -> ModelCheck:
    """Measure perplexity and routing of a checkpoint. The whole model is in memory.

    Args:
        folder: Checkpoint folder of a dense model or a Mixtral.
        dtype: Type to which the weights are rounded. The computation is in float32.
    """
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    seqlen = min(SEQLEN, model.config.max_position_embeddings)
    windows = PythonDocs(WINDOWS, seqlen).load(tokenizer).tokens
    experts = family_of(model.config).experts(model.config)
    options = {"output_router_logits": True} if experts else {}
    nll = 0.0
    choices: list[Tensor] = []
    for window in windows:
        output = model(window[None], use_cache=False, **options)
        nll += float(F.cross_entropy(output.logits[0, :-1], window[1:], reduction="sum"))
        if experts:
            choices.append(torch.stack([layer.argmax(-1) for layer in output.router_logits]))
    perplexity = math.exp(nll / (len(windows) * (seqlen - 1)))
    if not experts:
        return ModelCheck(perplexity, [], [])
    first = torch.stack(choices, dim=1)  # (layers, windows, t)
    shares = F.one_hot(first.flatten(1), experts).float().mean(1)
    repeats = (first[..., 1:] == first[..., :-1]).float().mean((1, 2))
    return ModelCheck(perplexity, shares.tolist(), repeats.tolist())
