"""What lies in a store's folder: listing it, and making room.

Only files that are named by a key are the store's: `result_cache.dir` may be a folder that holds somebody's models.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "[0-9a-f]{40}"
LEFT = 3600  # seconds after which a file that is still aside was left by a killed process


@dataclass(frozen=True)
class Entry:
    """One artefact's two files; either may be missing, when a process was killed between them."""

    data: Path
    record: Path

    @classmethod
    def at(cls, folder: Path, key: str) -> Entry:
        """The artefact of a key in a stage's folder."""
        return cls(folder / f"{key}.safetensors", folder / f"{key}.json")

    @property
    def stage(self) -> str:
        return self.data.parent.name

    @property
    def bytes(self) -> int:
        """Of both files; 0 where another process has just removed them."""
        return sum(_stat(path, "st_size") for path in (self.data, self.record))

    @property
    def used(self) -> float:
        """When it was last used, in seconds of the epoch."""
        return _stat(self.record, "st_mtime") or _stat(self.data, "st_mtime")

    def about(self) -> str:
        """What it is of."""
        with suppress(OSError, ValueError, KeyError):
            return str(json.loads(self.record.read_text(encoding="utf-8"))["about"])
        return "(unfinished or damaged)"


def entries(folder: Path) -> list[Entry]:
    """All artefacts below a store's folder, those unused for longest first."""
    found = {Entry.at(path.parent, path.stem) for path in _files(folder)}
    return sorted(found, key=lambda entry: (entry.used, entry.data))


def trim(folder: Path, limit: int) -> tuple[int, int]:
    """Remove what was unused for longest until `limit` bytes are left; returns how many artefacts and bytes went."""
    there = entries(folder)
    sizes = {entry: entry.bytes for entry in there}
    total, gone = sum(sizes.values()), 0
    before = total
    for entry in there:
        if total <= limit:
            break
        remove(entry)
        total -= sizes[entry]
        gone += 1
    return gone, before - total


def remove(entry: Entry) -> None:
    """Remove an artefact, its record first: a half-removed one must not look whole."""
    entry.record.unlink(missing_ok=True)
    entry.data.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> int:
    """Remove what killed processes had written aside; returns how many files."""
    aside = (path for path in folder.glob("*/.*.part") if re.match(rf"\.{KEY}\.", path.name))
    left = [path for path in aside if time.time() - _stat(path, "st_mtime") > LEFT]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.glob("*/*"):
        if re.fullmatch(rf"{KEY}\.(json|safetensors)", path.name):
            yield path


def _stat(path: Path, name: str) -> Any:
    with suppress(OSError):
        return getattr(path.stat(), name)
    return 0
