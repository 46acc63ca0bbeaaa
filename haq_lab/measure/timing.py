"""Time the steps of a generation, by wall time and by processor time, and those of several models in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Sample(NamedTuple):
    """The time of one step.

    Attributes:
        wall: Seconds of wall time.
        cpu: Seconds in which a processor worked for the calling thread. This thread takes part in all parallel work, so
            both times are nearly equal on a quiet machine, with any number of threads. A thread that waits for a
            processor, a disk or a sleeping helper uses none.
    """

    wall: float
    cpu: float


class Generation:
    """A greedy generation with a KV cache that advances step by step.

    Args:
        model: The model.
        prompt: The prompt (1, t). The first step reads it, and each later step reads one token.
    """

    def __init__(self, model: nn.Module, prompt: Tensor):
        self._model, self._tokens, self._cache = model, prompt, None

    def step(self) -> Sample:
        """Run one step and return its time."""
        wall, cpu = time.perf_counter(), time.thread_time()
        output: Any = self._model(self._tokens, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._tokens, self._cache = output.logits[:, -1:].argmax(-1), output.cache
        if self._tokens.is_cuda:
            torch.cuda.synchronize(self._tokens.device)
        return Sample(time.perf_counter() - wall, time.thread_time() - cpu)


def generate_in_turn(models: Sequence[nn.Module], prompt: Tensor, count: int, first: int = 0) -> list[list[Sample]]:
    """Generate with each of some models. Their steps alternate, so whatever else happens meets all of them.

    Args:
        models: The models.
        prompt: The prompt (1, t).
        count: Tokens to decode after the prompt.
        first: Index of the model that makes the first step. The order turns round with each step.

    Returns:
        For each model the times of the prompt and of each token, `1 + count` samples.
    """
    generations = [Generation(model, prompt) for model in models]
    samples: list[list[Sample]] = [[] for _ in models]
    for step in range(1 + count):
        order = range(len(models)) if (step + first) % 2 == 0 else reversed(range(len(models)))
        for index in order:
            samples[index].append(generations[index].step())
    return samples
