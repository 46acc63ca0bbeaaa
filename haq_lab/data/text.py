"""Read rows of text from the hub, from a local file, or from the documentation inside Python."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from haq_lab.utils.errors import UserError, nearest, nearest_beside
from haq_lab.utils.hub import hub_answers
from haq_lab.utils.paths import cache_folder

Split = Literal["train", "validation", "test"]

FORMATS = {".txt": "text", ".text": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


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


def load_rows(text: str, split: Split, path: str | None, setting: str) -> list[str]:
    """Read the rows of a text from a local file or from the hub.

    Args:
        text: `wikitext2` or `c4`. Any name if there is a path.
        split: Split to read from the hub. A local file is read whole.
        path: Plain text, or JSON lines or parquet with a field `text`. A line of plain text is one row and keeps its
            newline, as in the hub's copy. If null, the hub is read.
        setting: The setting that gives `path`, for error messages.

    Raises:
        UserError: If the file does not exist or cannot be read, or if the hub does not answer and there is no path.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{setting}: there is no file '{file}'{nearest_beside(file) or '. Correct the path.'}")
        if file.suffix not in FORMATS:
            raise UserError(
                f"{setting}: '{file}' has no known format. Choose a file that ends in {', '.join(FORMATS)}."
            )
        if FORMATS[file.suffix] == "text":  # not by `datasets`, which fails on invalid UTF-8
            return file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        try:
            rows = datasets.load_dataset(
                FORMATS[file.suffix],
                data_files=glob.escape(str(file)),
                split="train",
                cache_dir=str(cache_folder() / "datasets"),
            )
        except (DatasetGenerationError, OSError, ValueError) as error:
            raise UserError(
                f"{setting}: '{file}' cannot be read as {FORMATS[file.suffix]} ({error}). Check the file."
            ) from error
        if "text" not in rows.column_names:
            fields = ", ".join(rows.column_names)
            hint = nearest("text", rows.column_names) or "."
            raise UserError(f"{setting}: '{file}' has no field 'text'. Rename one of its fields: {fields}{hint}")
        documents = list(rows["text"])
        if not all(isinstance(document, str) for document in documents):
            raise UserError(f"{setting}: '{file}' has rows whose field 'text' is not a string. Remove or correct them.")
        return documents
    if text not in HUB:
        raise UserError(f"{setting}: a file is needed. Name a plain text, JSON lines or parquet file.")
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


@contextmanager
def _hub_or_its_cache() -> Iterator[None]:
    """Let `datasets` use only its local cache within the block if the hub does not answer."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not hub_answers():
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
