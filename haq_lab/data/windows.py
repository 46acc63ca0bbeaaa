"""Evaluation windows: each class is one published protocol, or an honest relative of it.

`windows(tokenizer)` gives token windows of equal length that do not overlap (C4's random crops may), and the
protocol stamp that belongs beside every figure measured on them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haq_lab.data.text import fingerprint, load_rows, python_docs
from haq_lab.utils.errors import UserError

Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]
C4_CROPS = 256


@plain_dataclass(frozen=True)
class Windows:
    """Token windows (n, t) int64 and their protocol stamp."""

    tokens: Tensor
    protocol: dict[str, Any]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """A text as one row of tokens (n,), with whatever the tokenizer puts around a text."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def _cut(tokens: Tensor, seqlen: int, windows: int | None, setting: str) -> Tensor:
    """Consecutive windows; the tail that fills none is dropped."""
    available = len(tokens) // seqlen
    if available == 0:
        raise UserError(f"{setting}: the text has {len(tokens)} tokens, less than one window of {seqlen}")
    count = min(windows or available, available)
    return tokens[: count * seqlen].view(count, seqlen)


def _stamped(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, text: str, **facts: Any) -> Windows:
    """Windows (n, t) of a text with their stamp, to which `facts` add or in which they replace."""
    count, seqlen = tokens.shape
    stamp = {
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "seqlen": seqlen,
        "stride": seqlen,
        "windows": count,
        "tokens_scored": count * (seqlen - 1),
        "level": "token",
        "text_sha256": fingerprint(text),
        "comparable_with": [],
    }
    return Windows(tokens, stamp | facts)


@dataclass(frozen=True)
class _Text:
    """Args:
    path: Local file in place of the hub's copy.
    windows: How many windows; null takes all.
    seqlen: Tokens a window.
    """

    path: str | None = None
    windows: Count | None = None
    seqlen: Length = 2048

    def _stamp(self, tokenizer: PreTrainedTokenizerBase, tokens: Tensor, text: str, **facts: Any) -> Windows:
        return _stamped(tokenizer, tokens, text, source=self.path or "hub", **facts)

    def _published(self, tables: str, windows: int | None) -> list[str]:
        """The tables a figure can stand beside: only with the hub's text, 2,048 tokens and all the windows."""
        return [tables] if self.path is None and self.seqlen == 2048 and self.windows == windows else []


@dataclass(frozen=True)
class Wikitext2(_Text):
    """WikiText-2's test split as GPTQ and SmoothQuant use it: rows joined by blank lines, consecutive windows."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        text = "\n\n".join(load_rows("wikitext2", "test", self.path, "data.wikitext2.path"))
        tokens = _cut(encode(tokenizer, text), self.seqlen, self.windows, "data.wikitext2.seqlen")
        tables = self._published("wikitext2 perplexity of GPTQ, SmoothQuant and HAQ", None)
        return self._stamp(tokenizer, tokens, text, split="test", join="\\n\\n", comparable_with=tables)


@dataclass(frozen=True)
class C4(_Text):
    """C4 as GPTQ's first protocol has it: 256 random crops of validation documents long enough, seed 0."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        documents = load_rows("c4", "validation", self.path, "data.c4.path")
        crops = random_crops(tokenizer, documents, self.windows or C4_CROPS, self.seqlen, 0, "data.c4.seqlen")
        tables = self._published("C4 perplexity of GPTQ and HAQ (random crops)", None)
        return self._stamp(
            tokenizer,
            crops,
            "\n".join(documents),
            split="validation",
            join="none: random crops, seed 0",
            stride="random",
            comparable_with=tables,
        )


@dataclass(frozen=True)
class C4New(_Text):
    """C4 as GPTQ's second protocol has it: the first 1,100 validation documents joined by a space, 256 windows."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        text = " ".join(load_rows("c4", "validation", self.path, "data.c4_new.path")[:1100])
        windows = min(self.windows or C4_CROPS, C4_CROPS)
        tokens = _cut(encode(tokenizer, text), self.seqlen, windows, "data.c4_new.seqlen")
        tables = self._published("c4-new perplexity of GPTQ", None)
        return self._stamp(
            tokenizer,
            tokens,
            text,
            split="validation, first 1,100 documents",
            join="space",
            comparable_with=tables,
        )


@dataclass(frozen=True)
class Text(_Text):
    """A file of your own: rows joined as they are (plain text) or by blank lines (JSON lines, parquet)."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        text = own_text(self.path, "data.text.path")
        tokens = _cut(encode(tokenizer, text), self.seqlen, self.windows, "data.text.seqlen")
        return self._stamp(tokenizer, tokens, text, split="whole file", join="as it is")


@dataclass(frozen=True)
class PythonDocs:
    """Python's own reference texts, evaluation part: real text that needs no download.

    Args:
        windows: How many windows; null takes all.
        seqlen: Tokens a window.
    """

    windows: Count | None = None
    seqlen: Length = 1024

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        import platform

        text = python_docs("evaluation")
        tokens = _cut(encode(tokenizer, text), self.seqlen, self.windows, "data.python_docs.seqlen")
        source = f"pydoc_data.topics of Python {platform.python_version()}"
        return _stamped(tokenizer, tokens, text, source=source, split="last 40 %", join="\\n\\n")


def own_text(path: str | None, setting: str) -> str:
    """The user's file as one text."""
    rows = load_rows("text", "train", path, setting)
    return "".join(rows) if rows and rows[0].endswith("\n") else "\n\n".join(rows)


def random_crops(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], count: int, seqlen: int, seed: int, setting: str
) -> Tensor:
    """Crops (count, seqlen) of documents that have at least `seqlen` tokens, drawn as GPTQ draws them."""
    draw = random.Random(seed)
    encoded: dict[int, Tensor] = {}
    crops: list[Tensor] = []
    if not documents:
        raise UserError(f"{setting}: the text is empty")
    while len(crops) < count:
        number = draw.randint(0, len(documents) - 1)
        if number not in encoded:
            encoded[number] = encode(tokenizer, documents[number])
            if len(encoded) == len(documents) and max(map(len, encoded.values())) < seqlen:
                raise UserError(f"{setting}: no document has {seqlen} tokens")
        tokens = encoded[number]
        if len(tokens) >= seqlen:
            start = draw.randint(0, max(len(tokens) - seqlen - 1, 0))
            crops.append(tokens[start : start + seqlen])
    return torch.stack(crops)
