"""Define the interface of a tracker, and send a finished run to trackers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import pandas as pd

from haq_lab.tracking.run_folder import RunFolder


@runtime_checkable
class Tracker(Protocol):
    """Receives a copy of a run, for example to upload it to an experiment tracking service.

    The methods are called once the run is finished: `start`, then any number of the others, then `finish`.
    """

    def start(self, folder: RunFolder, name: str, group: str | None) -> None:
        """Begin a run. `group` is the folder of its sweep, or None. All files must stay inside `folder.path`."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Record scalar metrics by name."""

    def table(self, name: str, content: pd.DataFrame) -> None:
        """Record a table."""

    def figure(self, path: Path) -> None:
        """Record an image file."""

    def artifact(self, path: Path, kind: str) -> None:
        """Record a file that the run wrote. `kind` says what it belongs to, such as `checkpoint`."""

    def finish(self) -> None:
        """End the run. Whatever was recorded must be written or uploaded when this returns."""


@dataclass(frozen=True)
class RunRecord:
    """What trackers receive of a run.

    Args:
        name: Name of the run.
        group: Folder of its sweep; None for a single run.
        metrics: Scalars by name.
        tables: Tables by name.
        figures: Image files.
        artifacts: Further files, and what each belongs to.
    """

    name: str
    group: str | None
    metrics: Mapping[str, float]
    tables: Mapping[str, pd.DataFrame]
    figures: Sequence[Path] = ()
    artifacts: Mapping[Path, str] = field(default_factory=dict)


def track_run(trackers: Iterable[Tracker], folder: RunFolder, record: RunRecord) -> None:
    """Send a finished run to each tracker.

    A tracker that fails never fails the run. The error is written to `events.jsonl` as `<class name>_failed`.
    """
    for tracker in trackers:
        try:
            _send(tracker, folder, record)
        except Exception as error:
            with suppress(OSError):
                folder.event(f"{type(tracker).__name__.lower()}_failed", error=f"{type(error).__name__}: {error}")


def _send(tracker: Tracker, folder: RunFolder, record: RunRecord) -> None:
    tracker.start(folder, record.name, record.group)
    tracker.metrics(record.metrics)
    for name, table in record.tables.items():
        tracker.table(name, table)
    for path in record.figures:
        tracker.figure(path)
    for path, kind in record.artifacts.items():
        tracker.artifact(path, kind)
    tracker.finish()
