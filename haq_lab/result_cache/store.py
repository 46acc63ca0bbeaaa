"""Artefacts of stages in one folder that runs, sweeps and processes share.

    FOLDER/<stage>/<key>.safetensors   tensors, and whatever else the stage made as JSON in a tensor of bytes
    FOLDER/<stage>/<key>.json          written last: every tensor's SHA-256; its time is that of the last use

The key is the hash of all that the artefact depends on (`keys.py`), so an artefact never becomes wrong, only unused.
The store never fails a run: what it cannot keep or trust is computed again, and said so once.
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
PATIENCE = 10  # seconds of waiting for another run's work until that is said


@dataclass
class Artifact:
    """What a stage made: tensors by name, and facts that JSON can hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: Any = None


class Store:
    """Args:
    folder: Where artefacts are kept; None keeps nothing and finds nothing.
    limit: Bytes that all of them may take; those unused for longest go first.

    Attributes:
        reused: How many artefacts were found, by stage.
        clock: Seconds spent on reading and verifying (`find`) and on writing (`keep`).
    """

    def __init__(self, folder: Path | None = None, limit: int = 0):
        self.folder, self.limit = folder, limit
        self.reused: dict[str, int] = {}
        self.clock = Stopwatch()
        self._writes = folder is not None
        self._said: set[str] = set()

    def fetch(self, stage: str, key: str, compute: Callable[[], Artifact], about: str = "") -> Artifact:
        """The artefact of that key, computed where it is not there; others who want it wait meanwhile."""
        if (found := self.get(stage, key)) is not None:
            return found
        with self.locked(key):
            if (found := self.get(stage, key)) is None:
                found = compute()
                self.put(stage, key, found, about)
        return found

    def get(self, stage: str, key: str) -> Artifact | None:
        """A kept artefact, every byte of it verified; None where there is none, or a damaged one."""
        if self.folder is None:
            return None
        entry = Entry.at(self.folder / stage, key)
        try:
            with self.clock.stage("find"):
                record = json.loads(entry.record.read_text(encoding="utf-8"))
                tensors, _ = read_shard(entry.data.parent, Shard(**record["shard"]))
                facts = json.loads(tensors.pop(FACTS).numpy().tobytes())
        except FileNotFoundError:
            return None
        except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            if entry.data.exists():  # or another run has just removed it, to make room
                self._say(f"{stage} is computed again: {error}")
            return None
        with suppress(OSError):
            os.utime(entry.record)
        self.reused[stage] = self.reused.get(stage, 0) + 1
        return Artifact(tensors, facts)

    def put(self, stage: str, key: str, artefact: Artifact, about: str = "") -> None:
        """Keep an artefact, if there is room; `about` is what `python -m haq_lab.result_cache ls` shows."""
        size = sum(tensor.nbytes for tensor in artefact.tensors.values())
        if self.folder is None or not self.has_room(stage, size):
            return
        entry = Entry.at(self.folder / stage, key)
        facts = json.dumps(artefact.facts).encode()
        padded = torch.frombuffer(bytearray(facts + b" " * (-len(facts) % 8)), dtype=torch.uint8)
        try:
            with self.clock.stage("keep"):
                shard = write_shard(entry.data, artefact.tensors | {FACTS: padded}, {})
                write_json(entry.record, {"about": about, "made": time.time(), "shard": asdict(shard)})
                self._make_room()
        except OSError as error:
            self._writes = False
            self._say(f"nothing more is kept in {self.folder} ({error.strerror}); the results are the same without")

    def has_room(self, stage: str, size: int) -> bool:
        """Whether `size` bytes of a stage's artefacts may be kept; says so where they are too many."""
        if self._writes and size > self.limit:
            self._say(f"{stage} is not kept: its {size / 1e9:,.1f} GB are more than result_cache.max_size")
        return self._writes and size <= self.limit

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Within the block no other process computes what `key` stands for; without a writable folder, it may."""
        lock = self._lock(key[:2])  # of 256: a lock for each key would leave as many files
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
                lock.acquire(timeout=PATIENCE)
            except Timeout:
                self._say("waiting for another run that computes what this one needs")
                lock.acquire()
        except OSError as error:
            self._writes = False
            self._say(f"{self.folder} cannot be written to ({error.strerror}); what is there is used, nothing is added")
            return None
        return lock

    def _make_room(self) -> None:
        """Remove what was unused for longest, unless another process is at it."""
        assert self.folder is not None
        if sum(entry.bytes for entry in entries(self.folder)) <= self.limit:
            return
        with suppress(Timeout), FileLock(self.folder / ".locks" / "trim", timeout=0):
            trim(self.folder, self.limit)
            remove_leftovers(self.folder)

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            say(f"result_cache: {what}", on=errors)
