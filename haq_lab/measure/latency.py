"""Measure the latency of the deployed model: the prefill of a prompt, then each token that is decoded after it.

The table `latency.csv` contains every sample.
"""

from __future__ import annotations

import time
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from haq_lab.data.windows import Windows
from haq_lab.measure.base import Study
from haq_lab.measure.prompts import RANDOM, PromptTexts, random_prompts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.utils.errors import UserError

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Latency:
    """Times the prefill of prompts and each token that is decoded with a KV cache.

    The first `iterations` prompts are counted by the offloading engine. If they take less than `seconds`, they are
    repeated, and only the timing goes on. So the counts do not depend on the speed.

    Args:
        prompt: Where the prompts come from: `text` is the first text of `data`, or the calibration text if there is
            none. `random` draws token ids, on which hit rates and simulated times say nothing about text.
        prompt_tokens: Tokens in a prompt.
        decode_tokens: Tokens to decode after each prompt.
        iterations: Number of prompts, and minimum number of repetitions.
        seconds: Minimum total time.
        warmup: Prompts before the first one that is timed and counted. They are other prompts than the counted ones,
            if the text is long enough.
        seed: Seed of random prompts.

    Example:
        >>> Latency(prompt_tokens=64, decode_tokens=16)(study)  # doctest: +SKIP
        {'latency.prefill_ms': 31.2, 'latency.decode_ms_per_token.mean': 5.1, ...}
    """

    prompt: Literal["text", "random"] = "text"
    prompt_tokens: Positive = 256
    decode_tokens: Positive = 32
    iterations: Positive = 3
    seconds: Annotated[float, Field(ge=0)] = 3.0
    warmup: Annotated[int, Field(ge=0)] = 1
    seed: int = 0

    evaluates: ClassVar[bool] = False
    deploys: ClassVar[bool] = True

    def load_prompts(self, model: LayeredModel, texts: PromptTexts) -> Windows:
        """Load the prompts: first the counted ones, then those of the warm-up.

        Args:
            model: The model that will run them.
            texts: The texts of the run.

        Returns:
            Prompts (n, prompt_tokens) and their protocol stamp. n is less than `iterations + warmup` if the text is
            short. The prompts are then repeated.

        Raises:
            UserError: The model has too few positions, or the text is too short or cannot be read.
        """
        needed, limit = self.prompt_tokens + self.decode_tokens, model.max_tokens
        if needed > limit:
            raise UserError(
                f"measure.latency.prompt_tokens: {self.prompt_tokens} and {self.decode_tokens} decoded tokens are more "
                f"than the model's {limit} positions. Choose at most {limit} for prompt_tokens and decode_tokens "
                "together."
            )
        count = self.iterations + self.warmup
        if self.prompt == RANDOM:
            prompts = random_prompts(model.config.vocab_size, self.prompt_tokens, count, self.seed)
        else:
            setting = "measure.latency.prompt_tokens"
            prompts = texts.load(model.tokenizer(), self.prompt_tokens, count, setting)
        stamp = {"prompts": min(self.iterations, len(prompts.tokens)), "decode_tokens": self.decode_tokens}
        return Windows(prompts.tokens, prompts.protocol | stamp)

    @torch.no_grad()
    def __call__(self, study: Study) -> dict[str, float]:
        """Time the deployed model. `study.prompts` must have the prompts of this measure.

        Returns:
            Milliseconds of the prefill and of a decoded token, and decoded tokens per second.
        """
        study.progress("latency")
        prompts = study.prompts[self].tokens.to(next(study.whole.parameters()).device)

        def generate(number: int) -> list[float]:
            return _generate(study.whole, prompts[number % len(prompts)][None], self.decode_tokens)

        for number in range(self.warmup):
            generate(self.iterations + number)
        started = time.perf_counter()
        with study.counting():
            runs = [generate(number) for number in range(self.iterations)]
        while time.perf_counter() - started < self.seconds:
            runs.append(generate(len(runs) % self.iterations))
        prefill = 1e3 * np.array([seconds[0] for seconds in runs])
        decode = 1e3 * np.array([seconds[1:] for seconds in runs]).flatten()
        samples = [("prefill", one) for one in prefill] + [("decode", one) for one in decode]
        study.tables["latency"] = pd.DataFrame(samples, columns=["phase", "ms"])
        return {
            "latency.prefill_ms": float(prefill.mean()),
            "latency.decode_ms_per_token.mean": float(decode.mean()),
            "latency.decode_ms_per_token.p50": float(np.percentile(decode, 50)),
            "latency.decode_ms_per_token.p95": float(np.percentile(decode, 95)),
            "latency.decode_ms_per_token.std": float(decode.std()),
            "latency.tokens_per_s": 1e3 / float(decode.mean()),
        }


def _generate(model: nn.Module, prompt: Tensor, count: int) -> list[float]:
    """Return the seconds of the prefill of a prompt (1, t), and of each of `count` decoded tokens."""
    tokens, cache = prompt, None
    seconds = []
    for _ in range(1 + count):
        start = time.perf_counter()
        output = model(tokens, cache=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = output.logits[:, -1:].argmax(-1), output.cache
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        seconds.append(time.perf_counter() - start)
    return seconds
