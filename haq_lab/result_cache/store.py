"""Store results in one folder that several runs and processes share.

    FOLDER/<stage>/<key>.safetensors   the tensors of a result, and its JSON as a tensor of bytes
    FOLDER/<stage>/<key>.json          the SHA-256 of every tensor; written last, and touched at every use

The key is the hash of everything that the result depends on (`keys.py`). So a result never becomes wrong, only unused.
The store never makes a run fail. If a result cannot be stored or verified, the run computes it and prints one warning.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from haq_lab.result_cache.eviction import Entry, entries, remove_leftovers, trim
from haq_lab.storage.safetensors_file import Shard, read_shard, write_shard
from haq_lab.utils.atomic_files import write_json
from haq_lab.utils.console import errors, say
from haq_lab.utils.errors import UserError
from haq_lab.utils.timer import Stopwatch

FACTS = "facts"  # the tensor that holds the JSON
SILENT_WAIT = 10  # seconds of waiting for another run before a message says so


@dataclass
class Artifact:
    """The result of a stage: tensors by name, and `facts` that JSON can represent."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: Any = None


class Store:
    """The results of earlier runs in one folder.

    Args:
        folder: Folder of the results. If None, nothing is stored or read.
        limit: Largest size of all results in bytes. The least recently used results are removed first.

    Attributes:
        reused: Number of results that were read, by stage.
        clock: Seconds spent on reading and verifying (`find`) and on writing (`keep`).

    Example:
        >>> result = Store(folder, 20 << 30).fetch("sensitivity", key, compute)  # doctest: +SKIP
    """

    def __init__(self, folder: Path | None = None, limit: int = 0):
        self.folder, self.limit = folder, limit
        self.reused: dict[str, int] = {}
        self.clock = Stopwatch()
        self._writes = folder is not None
        self._warned: set[str] = set()

    def fetch(self, stage: str, key: str, compute: Callable[[], Artifact], about: str = "") -> Artifact:
        """Return the result of a key. If it is not stored, compute and store it.

        Other processes that need the same key wait meanwhile.

        Args:
            stage: Name of the stage, which names the folder.
            key: The key from `keys.key_of`.
            compute: Computes the result.
            about: Description for `python -m haq_lab.result_cache ls`.
        """
        if (stored := self.get(stage, key)) is not None:
            return stored
        with self.locked(key):
            if (result := self.get(stage, key)) is None:
                result = compute()
                self.put(stage, key, result, about)
        return result

    def get(self, stage: str, key: str) -> Artifact | None:
        """Return a stored result after verifying every byte; None if there is none or if it is damaged."""
        if self.folder is None:
            return None
        entry = Entry.at(self.folder / stage, key)
        try:
            with self.clock.stage("find"):
                record = json.loads(entry.record.read_text(encoding="utf-8"))
                tensors, _ = read_shard(entry.data.parent, Shard(**record["shard"] | {"file": entry.data.name}))
                facts = json.loads(tensors.pop(FACTS).numpy().tobytes())
        except FileNotFoundError:
            return None
        except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if entry.data.exists():  # if not, another run has just evicted it
                self._warn_once(f"{stage} is computed again: {error}")
            return None
        with suppress(OSError):
            os.utime(entry.record)
        self.reused[stage] = self.reused.get(stage, 0) + 1
        return Artifact(tensors, facts)

    def put(self, stage: str, key: str, result: Artifact, about: str = "") -> None:
        """Store a result if there is room.

        Args:
            result: The result.
            about: Description for `python -m haq_lab.result_cache ls`.
        """
        size = sum(tensor.nbytes for tensor in result.tensors.values())
        if self.folder is None or not self.has_room(stage, size):
            return
        entry = Entry.at(self.folder / stage, key)
        facts = json.dumps(result.facts).encode()
        padded = torch.frombuffer(bytearray(facts + b" " * (-len(facts) % 8)), dtype=torch.uint8)
        try:
            with self.clock.stage("keep"):
                shard = write_shard(entry.data, result.tensors | {FACTS: padded}, {})
                write_json(entry.record, {"about": about, "made": time.time(), "shard": asdict(shard)})
                self._evict()
        except OSError as error:
            self._writes = False
            self._warn_once(f"nothing more is kept in {self.folder} ({error.strerror}). This run goes on without it.")

    def has_room(self, stage: str, size: int) -> bool:
        """Return whether `size` bytes of a stage's results fit into the cache, and print a warning if not."""
        if self._writes and size > self.limit:
            self._warn_once(
                f"{stage} is not kept: its {size / 1e9:,.1f} GB are more than result_cache.max_size. Raise it."
            )
        return self._writes and size <= self.limit

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Lock a key within the block, so that no other process computes its result.

        In a folder that cannot be written to, nothing is locked.
        """
        lock = self._lock(key[:2])  # 256 locks in all, because one lock a key would leave too many files
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _lock(self, name: str) -> FileLock | None:
        if self.folder is None or not self._writes:
            return None
        lock = FileLock(self.folder / ".locks" / name)
        try:
            (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=SILENT_WAIT)
            except Timeout:
                self._warn_once("waiting for another run that computes the same result")
                lock.acquire()
        except OSError as error:
            self._writes = False
            self._warn_once(
                f"{self.folder} cannot be written to ({error.strerror}). Its results are used, but none are added."
            )
            return None
        return lock

    def _evict(self) -> None:
        """Remove the least recently used results, unless another process does so already."""
        assert self.folder is not None
        if sum(entry.bytes for entry in entries(self.folder)) <= self.limit:
            return
        with suppress(Timeout), FileLock(self.folder / ".locks" / "trim", timeout=0):
            trim(self.folder, self.limit)
            remove_leftovers(self.folder)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            say(f"result_cache: {message}", on=errors)
