"""List the files of a folder that a loader could read, and find those that the folder's record does not name.

A file that is added to a folder can change its tokens or its weights. transformers reads, for example,
`added_tokens.json`, `chat_template.jinja`, `generation_config.json` and `model.safetensors.index.json` by their names.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from haq_lab.storage.json_form import is_file_name

TEMPLATES = "additional_chat_templates"  # the only subfolder that transformers reads by itself
DOCUMENTS = (".csv", ".html", ".jpg", ".log", ".md", ".pdf", ".png", ".rst", ".svg", ".txt")
VOCABULARIES = ("merges.txt", "vocab.txt")  # read by tokenizers in spite of their suffix
ACCEPT = "python -m haq_lab.checkpoint accept"  # the command that records the files of a folder


def loadable_files(folder: Path) -> list[str]:
    """Return the names of the files that a loader could read, sorted: all but documents and hidden files."""
    files = [*folder.iterdir(), *(folder / TEMPLATES).glob("*")]
    return sorted(path.relative_to(folder).as_posix() for path in files if path.is_file() and _is_loadable(path))


def unlisted_files(folder: Path, listed: Collection[str]) -> list[str]:
    """Return the names of the files that a loader could read and that `listed` does not contain."""
    return [name for name in loadable_files(folder) if name not in listed]


def is_inside(name: str) -> bool:
    """Return whether a record may list this name: a file of the folder, or an additional chat template."""
    return is_file_name(name.removeprefix(f"{TEMPLATES}/"))


def _is_loadable(path: Path) -> bool:
    is_document = path.suffix.lower() in DOCUMENTS and path.name not in VOCABULARIES
    return not path.name.startswith(".") and not is_document
