"""Generate one answer after the other with transformers' `generate`, streamed, and reuse the KV cache between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from haq_lab.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """A generated text and how it came about.

    Attributes:
        text: The text, without special tokens.
        tokens: Number of generated tokens, including an end token.
        first_token_s: Seconds from the call to the first token.
        decode_s: Seconds from the first token to the last.
        stopped: Whether the user stopped the answer.
        cut: Whether the answer ended because the largest number of tokens was reached.
        hits: Expert choices that found the expert in the fast tier. None without offloading.
        misses: Expert choices that did not. None without offloading.
        bytes_moved: Bytes moved to the fast tier. None without offloading.
    """

    text: str
    tokens: int
    first_token_s: float
    decode_s: float
    stopped: bool
    cut: bool
    hits: int | None = None
    misses: int | None = None
    bytes_moved: int | None = None

    def summary(self) -> str:
        """Return one line with the number of tokens, the speed and, with offloading, the traffic."""
        parts = [f"{self.tokens} token" + "s" * (self.tokens != 1)]
        if self.tokens > 1:
            parts.append(f"{(self.tokens - 1) / self.decode_s:.1f} tokens/s")
        parts.append(f"first token after {self.first_token_s:.2f} s")
        if self.hits is not None and self.misses is not None and self.bytes_moved is not None:
            parts.append(f"hit rate {self.hits / max(self.hits + self.misses, 1):.1%}")
            parts.append(f"{self.bytes_moved / 1e6:.1f} MB moved")
        if self.stopped:
            parts.append("stopped")
        elif self.cut:
            parts.append("cut off by --max-tokens or the context")
        return ", ".join(parts)


class Stop(StoppingCriteria):
    """Ends generations after the current token while `requested` is true."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, input_ids: Tensor, scores: Any, **arguments: Any) -> torch.BoolTensor:
        return cast(torch.BoolTensor, torch.full((len(input_ids),), self.requested, device=input_ids.device))


class Generator:
    """Generates answers with one model, one at a time.

    The KV cache of the last answer is reused if the next prompt begins with the same tokens, as in a chat.

    Args:
        model: The model, from `haq_lab.load`. With offloading it has the attribute `offload`.
        tokenizer: Its tokenizer.
        temperature: Temperature of the sampling; 0 is greedy. None uses the generation config of the model.
        max_tokens: Largest number of tokens in an answer.

    Attributes:
        stop: Stops the current answer if `stop.requested` is set.

    Example:
        >>> generator = Generator(*haq_lab.load("checkpoints/smol"), temperature=0)
        >>> generator.generate(generator.tokenizer("Once upon a time").input_ids, print).text
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float | None = None,
        max_tokens: int = 512,
    ):
        self.model: Any = model  # mypy takes the methods of transformers' models for tensors
        self.tokenizer = tokenizer
        self.temperature, self.max_tokens = temperature, max_tokens
        self.stop = Stop()
        self._cache: Cache | None = None
        self._cached: list[int] = []  # the tokens in `_cache`
        config = self.model.generation_config
        config.max_length = None  # `max_tokens` replaces it
        if config.pad_token_id is None:
            config.pad_token_id = 0  # one sequence is never padded, but transformers warns

    def generate(self, prompt: list[int], write: Callable[[str], object]) -> Answer:
        """Generate an answer to a prompt.

        Args:
            prompt: Token ids of the prompt.
            write: Called with each piece of the answer's text, when the piece is complete.

        Raises:
            UserError: The prompt is empty, or the model has no position left after it.
        """
        limit = min(self.max_tokens, self._positions_after(prompt))
        before = self._traffic()
        streamer = _TimedStreamer(self.tokenizer, write)
        cache, self._cache = self._cache if self._continues(prompt) else None, None  # not valid after an exception
        ids = torch.tensor([prompt], device=self.model.device)
        start = time.perf_counter()
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=limit, streamer=streamer,
            stopping_criteria=[self.stop], return_dict_in_generate=True, tokenizer=self.tokenizer, **self._sampling(),
        )  # fmt: skip
        tokens = output.sequences[0].tolist()
        if output.cache is not None:
            self._cache, self._cached = output.cache, tokens[: output.cache.get_seq_length()]
        answer = tokens[len(prompt) :]
        return Answer(
            text=self._decode(answer),
            tokens=len(answer),
            first_token_s=streamer.times[0] - start,
            decode_s=streamer.times[-1] - streamer.times[0],
            stopped=self.stop.requested,
            cut=len(answer) == limit and not self._is_end(answer[-1]),
            **{name: value - before[name] for name, value in self._traffic().items()},
        )

    def _positions_after(self, prompt: list[int]) -> int:
        """Return how many positions of the context a prompt leaves."""
        if not prompt:
            raise UserError("prompt: it is empty. Write a text.")
        limit: int = self.model.config.max_position_embeddings
        if len(prompt) >= limit:
            raise UserError(
                f"prompt: {len(prompt)} tokens do not fit into the model's context of {limit} tokens. "
                "Shorten it, or start a new chat."
            )
        return limit - len(prompt)

    def _continues(self, prompt: list[int]) -> bool:
        """Return whether a prompt begins with the tokens in the KV cache and has more."""
        return len(prompt) > len(self._cached) and prompt[: len(self._cached)] == self._cached

    def _sampling(self) -> dict[str, Any]:
        if self.temperature is None:
            return {}
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _is_end(self, token: int) -> bool:
        """Return whether a token ends an answer by the model's generation config."""
        end = self.model.generation_config.eos_token_id
        return bool(token in end if isinstance(end, list) else token == end)

    def _traffic(self) -> dict[str, Any]:
        """Return the counts of the offloading engine so far, or nothing without offloading."""
        session: Any = getattr(self.model, "offload", None)
        if session is None:
            return {}
        stats = session.stats()
        return {name: int(stats[name]) for name in ("hits", "misses", "bytes_moved")}


class _TimedStreamer(TextStreamer):
    """Passes on the text of an answer and notes the time of each token.

    Args:
        tokenizer: Tokenizer of the model.
        write: Called with each piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)
