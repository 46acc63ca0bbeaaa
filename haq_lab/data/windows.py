"""Load the texts of the group `data`, as evaluation windows and as a training part for calibration.

Each class is one published evaluation protocol, or a variant of one. Its `load` returns token windows and the protocol
stamp that is reported with every figure measured on them. Its `training_text` returns the part that calibration reads.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haq_lab.data.text import fingerprint, load_rows, python_docs
from haq_lab.data.text_files import Documents, read_documents
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError

Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]
Option = TypeVar("Option", bound=type)
C4_CROPS = 256

TEXTS: dict[str, type] = {}  # the registered classes, by the name that `calibration.text` uses


def register(name: str) -> Callable[[Option], Option]:
    """Register a class of the group `data`, so that `calibration.text=name` can use its training text.

    The class needs a method `training_text(setting) -> TrainingText`. If it has a field `path`, then
    `calibration.path` sets it.

    Example:
        >>> @register("shakespeare")  # doctest: +SKIP
        ... @dataclass(frozen=True)
        ... class Shakespeare:
        ...     path: str | None = None
        ...
        ...     def training_text(self, setting: str) -> TrainingText:
        ...         return TrainingText(load_rows("text", "train", self.path, setting))
    """

    def add(option: Option) -> Option:
        TEXTS[name] = option
        return option

    return add


@plain_dataclass(frozen=True)
class Windows:
    """Token windows and their protocol stamp.

    Attributes:
        tokens: (n, t) int64.
        protocol: The stamp.
        documents: (n,) document of each window, if several windows can come from one document.
    """

    tokens: Tensor
    protocol: dict[str, Any]
    documents: list[int] | None = None


@plain_dataclass(frozen=True)
class TrainingText:
    """The part of a text that calibration may read.

    Attributes:
        rows: Its documents, or the whole text as one row.
        documents: Whether every window lies inside one row. If false, there is only one row.
        source: Where the text comes from if the user gives no file, for the stamp.
    """

    rows: list[str]
    documents: bool = False
    source: str = "hub"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the tokens (n,) of a text, with the special tokens that the tokenizer adds."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def _cut(tokens: Tensor, seqlen: int, windows: int | None, setting: str) -> Tensor:
    """Cut tokens (n,) into consecutive windows (count, seqlen). The incomplete window at the end is dropped."""
    available = len(tokens) // seqlen
    if available == 0:
        raise _too_short(tokens, seqlen, setting)
    count = min(windows or available, available)
    if windows is not None and count < windows:
        say(f"{setting.rpartition('.')[0]}.windows: the text has {count} windows of {seqlen} tokens, not {windows}.")
    return tokens[: count * seqlen].view(count, seqlen)


def _too_short(tokens: Tensor, seqlen: int, setting: str) -> UserError:
    return UserError(
        f"{setting}: the text has {len(tokens)} tokens, less than one window of {seqlen}. "
        f"Choose {setting}={max(len(tokens), 2)} or less, or a longer text."
    )


def _stamped(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, text: str, **fields: Any) -> Windows:
    """Return windows (n, t) of a text with their protocol stamp. `fields` are added to the stamp or replace its own."""
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
    return Windows(tokens, stamp | fields)


@dataclass(frozen=True)
class _FileOrHubText:
    """A text that is read from a local file or from the hub.

    Args:
        path: Local file or folder to read instead of the hub's copy.
        column: Field of JSON or parquet that holds the text.
        windows: Number of windows. If null, all are used.
        seqlen: Tokens in a window.
    """

    path: str | None = None
    windows: Count | None = None
    seqlen: Length = 2048
    column: str = "text"

    def _stamp(self, tokenizer: PreTrainedTokenizerBase, tokens: Tensor, text: str, **fields: Any) -> Windows:
        return _stamped(tokenizer, tokens, text, source=self.path or "hub", **fields)

    def _published(self, tables: str) -> list[str]:
        """Return the published tables that a figure is comparable with.

        The text must be the hub's, with windows of 2,048 tokens, and all windows must be used.
        """
        return [tables] if self.path is None and self.seqlen == 2048 and self.windows is None else []


@register("wikitext2")
@dataclass(frozen=True)
class Wikitext2(_FileOrHubText):
    """WikiText-2 as GPTQ and SmoothQuant use it: rows joined by blank lines, consecutive windows.

    Args:
        path: Local file or folder to read instead of the hub's copy.
        column: Field of JSON or parquet that holds the text.
        windows: Number of windows. If null, all are used.
        seqlen: Tokens in a window.
    """

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Return windows of the test split."""
        text = "\n\n".join(load_rows("wikitext2", "test", self.path, "data.wikitext2.path", self.column))
        tokens = _cut(encode(tokenizer, text), self.seqlen, self.windows, "data.wikitext2.seqlen")
        tables = self._published("wikitext2 perplexity of GPTQ, SmoothQuant and HAQ")
        return self._stamp(tokenizer, tokens, text, split="test", join="\\n\\n", comparable_with=tables)

    def training_text(self, setting: str) -> TrainingText:
        """Return the train split as one text. `setting` is what sets `path`, for error messages."""
        return TrainingText(["\n\n".join(load_rows("wikitext2", "train", self.path, setting, self.column))])


@register("c4")
@dataclass(frozen=True)
class C4(_FileOrHubText):
    """C4 as in GPTQ's first protocol: 256 random crops of validation documents that are long enough, seed 0.

    Args:
        path: Local file or folder to read instead of the hub's copy.
        column: Field of JSON or parquet that holds the text.
        windows: Number of windows. If null, 256.
        seqlen: Tokens in a window.
    """

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Return random crops of the validation split. They may overlap."""
        documents = load_rows("c4", "validation", self.path, "data.c4.path", self.column)
        crops, chosen = random_crops(tokenizer, documents, self.windows or C4_CROPS, self.seqlen, 0, "data.c4.seqlen")
        tables = self._published("C4 perplexity of GPTQ and HAQ (random crops)")
        windows = self._stamp(
            tokenizer,
            crops,
            "\n".join(documents),
            split="validation",
            join="none: random crops, seed 0",
            stride="random",
            comparable_with=tables,
        )
        return replace(windows, documents=chosen)

    def training_text(self, setting: str) -> TrainingText:
        """Return the documents of the train split. `setting` is what sets `path`, for error messages."""
        return TrainingText(load_rows("c4", "train", self.path, setting, self.column), documents=True)


@register("c4_new")
@dataclass(frozen=True)
class C4New(_FileOrHubText):
    """C4 as in GPTQ's second protocol: the first 1,100 validation documents joined by spaces, 256 windows.

    Args:
        path: Local file or folder to read instead of the hub's copy.
        column: Field of JSON or parquet that holds the text.
        windows: Number of windows, at most 256. If null, 256.
        seqlen: Tokens in a window.
    """

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Return consecutive windows of the joined validation documents."""
        text = " ".join(load_rows("c4", "validation", self.path, "data.c4_new.path", self.column)[:1100])
        windows = min(self.windows or C4_CROPS, C4_CROPS)
        tokens = _cut(encode(tokenizer, text), self.seqlen, windows, "data.c4_new.seqlen")
        tables = self._published("c4-new perplexity of GPTQ")
        return self._stamp(
            tokenizer,
            tokens,
            text,
            split="validation, first 1,100 documents",
            join="space",
            comparable_with=tables,
        )

    def training_text(self, setting: str) -> TrainingText:
        """Return the documents of the train split, as `C4` does."""
        return C4(path=self.path, column=self.column).training_text(setting)


@register("text")
@dataclass(frozen=True)
class Text(_FileOrHubText):
    """A file of the user's own, or a folder of files.

    A plain file is scored as it is. Several documents are joined by blank lines: rows of JSON and parquet, and files.

    Args:
        path: The file, or a folder of files: plain text, JSON, JSON lines or parquet.
        column: Field of JSON or parquet that holds the text.
        windows: Number of windows. If null, all are used.
        seqlen: Tokens in a window.
    """

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Return consecutive windows of the whole file."""
        documents = own_documents(self.path, "data.text.path", self.column)
        text = documents.joined
        tokens = _cut(encode(tokenizer, text), self.seqlen, self.windows, "data.text.seqlen")
        return self._stamp(tokenizer, tokens, text, split="whole file", join=documents.joining_rule)

    def training_text(self, setting: str) -> TrainingText:
        """Return the whole file. `setting` is what sets `path`, for error messages."""
        return TrainingText([own_documents(self.path, setting, self.column).joined])


@register("python_docs")
@dataclass(frozen=True)
class PythonDocs:
    """Python's own reference texts, which need no download.

    Args:
        windows: Number of windows. If null, all are used.
        seqlen: Tokens in a window.
    """

    windows: Count | None = None
    seqlen: Length = 1024

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Return consecutive windows of the evaluation part."""
        import platform

        text = python_docs("evaluation")
        tokens = _cut(encode(tokenizer, text), self.seqlen, self.windows, "data.python_docs.seqlen")
        source = f"pydoc_data.topics of Python {platform.python_version()}"
        return _stamped(tokenizer, tokens, text, source=source, split="last 40 %", join="\\n\\n")

    def training_text(self, setting: str) -> TrainingText:
        """Return the calibration part, which shares no paragraph with the evaluation part."""
        return TrainingText([python_docs("calibration")], source="python")


def own_documents(path: str | None, setting: str, column: str = "text") -> Documents:
    """Return the documents of the user's file or folder.

    Args:
        setting: The setting that gives `path`, for error messages.
        column: Field of JSON or parquet that holds the text.

    Raises:
        UserError: If there is no path, or if the file cannot be read.
    """
    if path is None:
        raise UserError(f"{setting}: a file is needed. Name a plain text, JSON lines or parquet file.")
    return read_documents(path, setting, column)


def random_crops(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], count: int, seqlen: int, seed: int, setting: str
) -> tuple[Tensor, list[int]]:
    """Draw windows from inside random documents, in the same random order as GPTQ's code.

    Args:
        documents: Texts. Those with fewer than `seqlen` tokens are skipped.
        setting: The setting that gives `seqlen`, for error messages.

    Returns:
        Token windows (count, seqlen), which may overlap, and the index of each window's document.

    Raises:
        UserError: If no document has `seqlen` tokens.
    """
    draw = random.Random(seed)
    encoded: dict[int, Tensor] = {}
    crops: list[Tensor] = []
    chosen: list[int] = []
    if not documents:
        raise UserError(f"{setting}: the text is empty. Choose another text.")
    while len(crops) < count:
        number = draw.randint(0, len(documents) - 1)
        if number not in encoded:
            encoded[number] = encode(tokenizer, documents[number])
            if len(encoded) == len(documents) and max(map(len, encoded.values())) < seqlen:
                raise UserError(f"{setting}: no document has {seqlen} tokens. Choose fewer tokens, or another text.")
        tokens = encoded[number]
        if len(tokens) >= seqlen:
            start = draw.randint(0, max(len(tokens) - seqlen - 1, 0))
            crops.append(tokens[start : start + seqlen])
            chosen.append(number)
    return torch.stack(crops), chosen


def random_windows(tokens: Tensor, count: int, seqlen: int, seed: int, setting: str) -> Tensor:
    """Draw windows (count, seqlen) at random places of one text, in the same random order as GPTQ's code.

    Args:
        tokens: The text (n,).
        setting: The setting that gives `seqlen`, for error messages.

    Raises:
        UserError: If the text has fewer than `seqlen` tokens.
    """
    if len(tokens) < seqlen:
        raise _too_short(tokens, seqlen, setting)
    draw = random.Random(seed)
    last = max(len(tokens) - seqlen - 1, 0)
    starts = [draw.randint(0, last) for _ in range(count)]
    return torch.stack([tokens[start : start + seqlen] for start in starts])
