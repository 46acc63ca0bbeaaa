"""Define the interface of a tracker, and send a finished run to trackers."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from haq_lab.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

INTERACTIVE = ".plotly.json"  # end of the name of a figure that plotly can read


@runtime_checkable
class Tracker(Protocol):
    """Receives a copy of a run, for example to upload it to an experiment tracking service.

    The methods are called once the run is finished: `start`, then any number of the others, then `finish`.
    """

    def start(self, folder: RunFolder, name: str, group: str | None) -> None:
        """Begin a run. `group` is the folder of its sweep, or None. Files for a later upload stay in `folder.path`."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Record scalar metrics by name."""

    def table(self, name: str, content: pd.DataFrame) -> None:
        """Record a table."""

    def figure(self, path: Path) -> None:
        """Record an image file, or a plotly figure as JSON (`NAME.plotly.json`). The file may be removed afterwards."""

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


def track_run(trackers: Iterable[Tracker], folder: RunFolder, record: RunRecord, private: bool = False) -> None:
    """Send a finished run to each tracker.

    A tracker that fails never fails the run. The error is written to `events.jsonl` as `<class name>_failed`.

    Args:
        trackers: The trackers.
        folder: The run folder.
        record: What they receive.
        private: Whether settings, paths and names made of them are left out. The run then gets a random name, which
            `events.jsonl` has as `tracked_as`. Checkpoint manifests are left out, because they contain the settings.
    """
    trackers = list(trackers)
    shown = folder
    if private and trackers:
        record = replace(record, name=f"run-{secrets.token_hex(4)}", group=None, artifacts={})
        shown = RunFolder(folder.path, {})
        folder.event("tracked_as", run=record.name)
    for tracker in trackers:
        try:
            _send(tracker, shown, record)
        except Exception as error:
            with suppress(OSError):
                folder.event(f"{type(tracker).__name__.lower()}_failed", error=f"{type(error).__name__}: {error}")


def _send(tracker: Tracker, folder: RunFolder, record: RunRecord) -> None:
    tracker.start(folder, record.name, record.group)
    tracker.metrics({**record.metrics, **perplexity_ratios(record.metrics)})
    for name, table in record.tables.items():
        tracker.table(name, table)
    for path in record.figures:
        tracker.figure(path)
    for path, kind in record.artifacts.items():
        tracker.artifact(path, kind)
    tracker.finish()


def perplexity_ratios(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return each perplexity divided by that of full precision, with its 95 % interval if the run has one.

    Args:
        metrics: Metrics by name. `dlnppl.<data>` is the logarithm of the ratio, paired over the windows.

    Returns:
        `perplexity_ratio.<data>`, and the same with `.low` and `.high`.

    Example:
        >>> perplexity_ratios({"dlnppl.c4": 0.0, "dlnppl.c4.stderr": 0.1})
        {'perplexity_ratio.c4': 1.0}
    """
    parts = {name: name.removeprefix("dlnppl.") for name in metrics if name.startswith("dlnppl.")}
    return {
        f"perplexity_ratio.{part}": math.exp(metrics[name])
        for name, part in parts.items()
        if not part.endswith(".stderr")
    }


def interactive(path: Path) -> Any | None:
    """Return plotly's figure of a file, or None if the file is an image."""
    if not path.name.endswith(INTERACTIVE):
        return None
    from plotly.io import read_json

    return read_json(path)


def artifact_name(path: Path, kind: str) -> str:
    """Return a name for a file that a run wrote, such as `checkpoint-smol`, in characters that services allow."""
    return re.sub(r"[^\w.-]", "-", f"{kind}-{path.parent.name}")


def flat_settings(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the settings of a nested config by their full names.

    Args:
        config: A resolved config.
        prefix: Put before each name.

    Example:
        >>> flat_settings({"model": {"name": "gpt"}, "force": False})
        {'model.name': 'gpt', 'force': False}
    """
    flat: dict[str, object] = {}
    for name, value in config.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
