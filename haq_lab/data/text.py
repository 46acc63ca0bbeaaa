"""Rows of text, from the hub or from a local file, through `datasets`; and the text inside Python itself."""

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
    """A text on the hub: repository, its configuration, and the file of each split where it has many."""

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
    """The rows of a text: from `path` where it is given, else from the hub.

    Args:
        text: `wikitext2` or `c4` on the hub; any name with a path.
        path: Plain text (a row a line, its newline kept, as the hub's rows have it), JSON lines or parquet
            with a field `text`.
        setting: How the user sets `path`, for messages.

    Raises:
        UserError: No such file, an unreadable one, or neither a path nor the hub at hand.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{setting}: there is no file '{file}'{nearest_beside(file)}")
        if file.suffix not in FORMATS:
            raise UserError(f"{setting}: '{file}' is none of {', '.join(FORMATS)}")
        if FORMATS[file.suffix] == "text":  # read here: it also takes Windows line ends and stray bytes
            return file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        try:
            rows = datasets.load_dataset(
                FORMATS[file.suffix],
                data_files=glob.escape(str(file)),
                split="train",
                cache_dir=str(cache_folder() / "datasets"),
            )
        except (DatasetGenerationError, OSError, ValueError) as error:
            raise UserError(f"{setting}: '{file}' cannot be read as {FORMATS[file.suffix]} ({error})") from error
        if "text" not in rows.column_names:
            fields = ", ".join(rows.column_names)
            raise UserError(
                f"{setting}: '{file}' has no field 'text' (it has {fields}){nearest('text', rows.column_names)}"
            )
        documents = list(rows["text"])
        if not all(isinstance(document, str) for document in documents):
            raise UserError(f"{setting}: '{file}' has rows whose 'text' is not a text")
        return documents
    if text not in HUB:
        raise UserError(f"{setting}: a file is needed (plain text, JSON lines or parquet)")
    hub = HUB[text]
    files = None if hub.files is None else {split: hub.files[split]}
    try:
        with _hub_or_its_cache():
            rows = datasets.load_dataset(hub.repository, hub.configuration, data_files=files, split=split)
            return list(rows["text"])
    except Exception as error:  # the hub client has no common base for what can go wrong on a network
        raise UserError(
            f"{text}: the hub did not give {hub.repository} ({type(error).__name__}). Give it network, or a local "
            f"copy: {setting}=FILE (plain text, JSON lines or parquet); data=[python_docs] "
            "calibration=python_docs needs neither"
        ) from error


@contextmanager
def _hub_or_its_cache() -> Iterator[None]:
    """Where the hub does not answer, `datasets` looks only at what was downloaded before."""
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
    """The reference texts that Python's `help()` shows, split once and for all.

    Paragraphs that stand in several topics are taken once, so that the parts share none. The first 60 % of the
    text calibrate, the rest evaluates.
    """
    from pydoc_data import topics

    paragraphs = dict.fromkeys(
        paragraph.strip("\n") for topic in sorted(topics.topics) for paragraph in topics.topics[topic].split("\n\n")
    )
    kept = [paragraph for paragraph in paragraphs if paragraph.strip()]
    total = sum(map(len, kept))
    seen, cut = 0, 0
    while seen < 0.6 * total:
        seen += len(kept[cut])
        cut += 1
    return "\n\n".join(kept[:cut] if part == "calibration" else kept[cut:])


def fingerprint(text: str) -> str:
    """A short hash of a text, for stamps."""
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:16]
