"""Run the requests of a server one after the other, and stop those whose client has left."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from contextlib import suppress
from typing import Any, cast

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
)

from haq_lab.serve.metrics import Metrics
from haq_lab.serve.stop_strings import Cut, CutQueue, stop_strings

SEED = "seed"  # attribute of the generation settings of a request
STOP_SECONDS = 30  # how long a stopping server waits for the token that is being computed


class OneQueue(GenerationState):
    """The queue of all requests, whatever their endpoint.

    Args:
        queue: The queue of the model.
    """

    def __init__(self, queue: RequestQueue):
        super().__init__()
        self._queue = queue

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """Return the queue. There is one model and no continuous batching."""
        return self._queue


class RequestQueue(GenerateManager):
    """Runs generations one after the other on one thread.

    Args:
        context: Tokens of the longest sequence that the model supports.
        metrics: Metrics of the server.
    """

    def __init__(self, context: int, metrics: Metrics):
        super().__init__()
        self._context, self._metrics = context, metrics
        self._jobs: set[_Job] = set()

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Any]:
        """Queue a request whose text is streamed. The text ends before the stop string that stopped it.

        Raises:
            HTTPException: The prompt is empty or too long.
        """
        job = self._new_job(model, inputs, gen_config)
        queue, streamer = super().generate_streaming(
            cast(PreTrainedModel, job), processor, inputs, gen_config, request_id, response_parser
        )
        return cast(asyncio.Queue[Any], CutQueue(queue, stop_strings(gen_config.stop_strings))), streamer

    async def generate_non_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, Any]:
        """Queue a request and return its text, the length of its prompt and its tokens.

        The text ends before the stop string that stopped it. The tokens include it.

        Raises:
            HTTPException: The prompt is empty or too long.
        """
        job = self._new_job(model, inputs, gen_config)
        answer = super().generate_non_streaming(cast(PreTrainedModel, job), processor, inputs, gen_config, request_id)
        try:
            text, length, tokens = await asyncio.shield(asyncio.create_task(answer))
        except asyncio.CancelledError:  # the client has left
            job.cancelled.set()
            raise
        cut = Cut(stop_strings(gen_config.stop_strings))
        return cut.feed(text) + cut.finish(), length, tokens

    def cancel_all(self) -> None:
        """End all answers after their next token."""
        for job in list(self._jobs):
            job.cancelled.set()

    def stop(self) -> None:
        """Cancel all requests, and wait until the model does not compute any more."""
        self.cancel_all()
        with suppress(TimeoutError):
            self.submit(lambda: None).result(STOP_SECONDS)

    def _new_job(self, model: PreTrainedModel, inputs: dict[str, Any], settings: GenerationConfig) -> _Job:
        """Check the length of a prompt, limit the answer to the rest of the context, and return the job."""
        length = inputs["input_ids"].shape[-1]
        if not length:
            raise HTTPException(400, "The prompt is empty. Write at least one character.")
        if length >= self._context:
            raise HTTPException(
                400,
                f"The prompt has {length} tokens, but the model's context has {self._context}, with the answer. "
                "Shorten the prompt.",
            )
        room = self._context - length
        settings.max_new_tokens = min(settings.max_new_tokens or room, room)
        self._metrics.prompt_tokens.inc(length)
        return _Job(model, getattr(settings, SEED, None), self._metrics, self._jobs)


class _Job:
    """One request. It takes the place of the model in transformers' queue, to count, time and stop the generation.

    Args:
        model: The model.
        seed: Seed of the sampling. If None, the answer continues the random numbers of the request before.
        metrics: Metrics of the server.
        jobs: All jobs that run or wait. This one is among them until it ends.
    """

    def __init__(self, model: PreTrainedModel, seed: int | None, metrics: Metrics, jobs: set[_Job]):
        self._model: Any = model  # mypy takes the methods of transformers' models for tensors
        self._seed, self._metrics, self._jobs = seed, metrics, jobs
        self.cancelled = threading.Event()
        self._tokens, self._arrived_at, self._first_at = 0, time.perf_counter(), 0.0
        jobs.add(self)
        metrics.queued.inc()

    def generate(self, **arguments: Any) -> Tensor:
        """Generate with the model's `generate`. The thread of the queue calls this."""
        outcome, start = "failed", time.perf_counter()
        try:
            if self._seed is not None:
                torch.manual_seed(self._seed)
            tokens = arguments["input_ids"]
            if not self.cancelled.is_set():
                tokens = self._model.generate(**arguments, stopping_criteria=StoppingCriteriaList([self]))
            outcome = "cancelled" if self.cancelled.is_set() else "finished"
            return tokens
        except _GenerationCancelled:  # the client of a stream has left
            outcome = "cancelled"
            raise
        except Exception as error:
            if "streamer" not in arguments:
                raise
            logging.getLogger("uvicorn.error").exception("A streamed answer failed.")
            raise RuntimeError(json.dumps(str(error))[1:-1]) from error  # transformers puts it between quotes
        finally:
            self._metrics.requests.labels(outcome).inc()
            self._metrics.seconds.inc(time.perf_counter() - start)
            self._metrics.queued.dec()
            self._jobs.discard(self)

    def __call__(self, tokens: Tensor, scores: Any, **arguments: Any) -> Tensor:
        """Count a token, and return for each sequence whether to stop. `generate` calls this after each token."""
        now = time.perf_counter()
        if self._tokens == 0:
            self._first_at = now
            self._metrics.first_token_seconds.observe(now - self._arrived_at)
        else:
            self._metrics.tokens_per_second = self._tokens / (now - self._first_at)
        self._tokens += 1
        self._metrics.tokens.inc()
        return torch.full((len(tokens),), self.cancelled.is_set(), device=tokens.device)
