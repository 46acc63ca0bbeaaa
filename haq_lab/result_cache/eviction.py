"""List the results in a cache folder, and remove the least recently used ones.

Only files that are named by a key are touched, because `result_cache.dir` may contain other files of the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haq_lab.utils.atomic_files import is_leftover

KEY = "[0-9a-f]{40}"


@dataclass(frozen=True)
class Entry:
    """The two files of one result. One may be missing if a process was killed between writing them."""

    data: Path
    record: Path

    @classmethod
    def at(cls, folder: Path, key: str) -> Entry:
        """Return the entry of a key in a stage's folder."""
        return cls(folder / f"{key}.safetensors", folder / f"{key}.json")

    @property
    def stage(self) -> str:
        """The stage that computed the result."""
        return self.data.parent.name

    @property
    def bytes(self) -> int:
        """Size of both files; 0 if another process has just removed them."""
        return sum(_stat(path, "st_size") for path in (self.data, self.record))

    @property
    def used(self) -> float:
        """Time of the last use, in seconds since the epoch."""
        return _stat(self.record, "st_mtime") or _stat(self.data, "st_mtime")

    def about(self) -> str:
        """Return a description of the result, such as its model and text."""
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return str(json.loads(self.record.read_text(encoding="utf-8"))["about"])
        return "(unfinished or damaged)"


def entries(folder: Path) -> list[Entry]:
    """Return all results in a cache folder, least recently used first."""
    unordered = {Entry.at(path.parent, path.stem) for path in _files(folder)}
    return sorted(unordered, key=lambda entry: (entry.used, entry.data))


def trim(folder: Path, limit: int) -> tuple[int, int]:
    """Remove the least recently used results until at most `limit` bytes are left.

    Returns:
        The numbers of removed results and of removed bytes.
    """
    by_last_use = entries(folder)
    sizes = {entry: entry.bytes for entry in by_last_use}
    total, removed = sum(sizes.values()), 0
    before = total
    for entry in by_last_use:
        if total <= limit:
            break
        remove(entry)
        total -= sizes[entry]
        removed += 1
    return removed, before - total


def remove(entry: Entry) -> None:
    """Remove a result. Its record goes first, so that a half-removed result does not look complete."""
    entry.record.unlink(missing_ok=True)
    entry.data.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> int:
    """Remove the temporary files of killed processes, and return their number."""
    temporary = (path for path in folder.glob("*/.*.part") if re.match(rf"\.{KEY}\.", path.name))
    stale = [path for path in temporary if is_leftover(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.glob("*/*"):
        if re.fullmatch(rf"{KEY}\.(json|safetensors)", path.name):
            yield path


def _stat(path: Path, name: str) -> Any:
    with suppress(OSError):
        return getattr(path.stat(), name)
    return 0
