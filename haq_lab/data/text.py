"""Read rows of text from the hub, from a local file, or from the documentation inside Python."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from haq_lab.data.text_files import read_documents
from haq_lab.utils.errors import UserError
from haq_lab.utils.hugging_face import hub_is_reachable

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class HubText:
    """A text on the hub.

    Attributes:
        repository: Its repository.
        configuration: The repository's configuration, if it has several.
        files: The file to read for each split, if a split has many.
    """

    repository: str
    configuration: str | None = None
    files: dict[str, str] | None = None


HUB = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": HubText(
        "allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
}


def load_rows(text: str, split: Split, path: str | None, setting: str, column: str = "text") -> list[str]:
    """Read the rows of a text from a local file or from the hub.

    Args:
        text: `wikitext2` or `c4`. Any name if there is a path.
        split: Split to read from the hub. A local file is read whole.
        path: File or folder (see `read_documents`). A line of a plain file is one row, as in the hub's copies. If null,
            the hub is read.
        setting: The setting that gives `path`, for error messages.
        column: Field of JSON or parquet that holds the text.

    Raises:
        UserError: If the file does not exist or cannot be read, or if the hub does not answer and there is no path.
    """
    if path is not None:
        documents = read_documents(path, setting, column)
        if not documents.plain:
            return documents.texts
        lines = [line for document in documents.texts for line in _lines(document)]
        # The hub's copy of WikiText-2 has an empty row for each blank line of the raw file.
        return [line if line.strip() else "" for line in lines] if text == "wikitext2" else lines
    if text not in HUB:
        raise UserError(f"{setting}: a file is needed. Name a plain text, JSON lines or parquet file.")
    import datasets

    datasets.disable_progress_bars()
    hub = HUB[text]
    files = None if hub.files is None else {split: hub.files[split]}
    try:
        with _hub_or_its_cache():
            rows = datasets.load_dataset(hub.repository, hub.configuration, data_files=files, split=split)
            return list(rows["text"])
    except Exception as error:  # the hub client's network errors have no common base class
        raise UserError(
            f"{text}: {hub.repository} cannot be read from the hub ({type(error).__name__}). Give it network, or a "
            f"local copy: {setting}=FILE (plain text, JSON lines or parquet). Without either, choose "
            "data=[python_docs] calibration=python_docs."
        ) from error


def _lines(text: str) -> list[str]:
    """Split a text at `\\n` only, and keep the newlines. `str.splitlines` also splits at form feeds and U+2028."""
    return [line for line in re.split(r"(?<=\n)", text) if line]


@contextmanager
def _hub_or_its_cache() -> Iterator[None]:
    """Let `datasets` use only its local cache within the block if the hub does not answer."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not hub_is_reachable():
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def python_docs(part: Literal["calibration", "evaluation"]) -> str:
    """Return one of two parts of the reference texts that Python's `help()` shows.

    A paragraph that occurs in several topics is used once, so the two parts share no paragraph. The first 60 % of the
    text are the calibration part. The rest is the evaluation part.

    Args:
        part: The part to return.
    """
    from pydoc_data import topics

    paragraphs = dict.fromkeys(
        paragraph.strip("\n") for topic in sorted(topics.topics) for paragraph in topics.topics[topic].split("\n\n")
    )
    texts = [paragraph for paragraph in paragraphs if paragraph.strip()]
    total = sum(map(len, texts))
    length, cut = 0, 0
    while length < 0.6 * total:
        length += len(texts[cut])
        cut += 1
    return "\n\n".join(texts[:cut] if part == "calibration" else texts[cut:])


def fingerprint(text: str) -> str:
    """Return a short hash of a text, for protocol stamps."""
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:16]
