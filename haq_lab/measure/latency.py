"""Latency of the deployed model: prefill of a prompt, then token by token with a KV cache, each timed alone.

Every sample is kept, in `latency.csv`.
"""

from __future__ import annotations

import time
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from haq_lab.measure.base import Study

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Latency:
    """Args:
    prompt_tokens: Length of the prompt.
    decode_tokens: Tokens decoded after each prompt.
    iterations: At least so many prompts.
    seconds: At least so long.
    warmup: Prompts before anything counts.
    """

    prompt_tokens: Positive = 256
    decode_tokens: Positive = 32
    iterations: Positive = 3
    seconds: Annotated[float, Field(ge=0)] = 3.0
    warmup: Annotated[int, Field(ge=0)] = 1

    evaluates: ClassVar[bool] = False
    deploys: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, study: Study) -> dict[str, float]:
        study.progress("latency")
        decode_tokens = min(self.decode_tokens, study.model.max_tokens - 1)
        prompt_tokens = min(self.prompt_tokens, study.model.max_tokens - decode_tokens)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, study.model.config.vocab_size, (1, prompt_tokens), generator=generator)
        prompt = prompt.to(next(study.whole.parameters()).device)
        for _ in range(self.warmup):
            _generate(study.whole, prompt, decode_tokens)
        prefill: list[float] = []
        decode: list[float] = []
        started = time.perf_counter()
        while len(prefill) < self.iterations or time.perf_counter() - started < self.seconds:
            first, others = _generate(study.whole, prompt, decode_tokens)
            prefill.append(first)
            decode += others
        milliseconds = 1e3 * np.array(decode)
        samples = [("prefill", 1e3 * seconds) for seconds in prefill] + [("decode", one) for one in milliseconds]
        study.tables["latency"] = pd.DataFrame(samples, columns=["phase", "ms"])
        return {
            "latency.prefill_ms": 1e3 * float(np.mean(prefill)),
            "latency.decode_ms_per_token.mean": float(milliseconds.mean()),
            "latency.decode_ms_per_token.p50": float(np.percentile(milliseconds, 50)),
            "latency.decode_ms_per_token.p95": float(np.percentile(milliseconds, 95)),
            "latency.decode_ms_per_token.std": float(milliseconds.std()),
            "latency.tokens_per_s": 1e3 / float(milliseconds.mean()),
        }


def _generate(model: nn.Module, prompt: Tensor, count: int) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each of `count` decoded tokens."""
    tokens, cache = prompt, None
    seconds = []
    for _ in range(1 + count):
        start = time.perf_counter()
        output = model(tokens, cache=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = output.logits[:, -1:].argmax(-1), output.cache
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1:]
