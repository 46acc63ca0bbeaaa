"""Record the provenance of a checkpoint, which allows to reproduce it and to decide whether a run may resume it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from haq_lab.storage.content_hash import file_hashes
from haq_lab.utils.environment import machine, versions

SETTINGS = ("model", "quantizer", "calibration", "backend")  # groups of settings that determine a checkpoint's bytes


def provenance(folder: Path, label: str, config: dict[str, Any], calibration: dict[str, Any] | None) -> dict[str, Any]:
    """Return a run's provenance. It has no times or paths, so equal runs give equal bytes.

    Args:
        folder: The model's folder.
        label: The model's short name.
        config: The run's resolved settings.
        calibration: Source, hash and seed of the calibration text. None if the run has no calibration.
    """
    return {
        "model": {"label": label, "revision": _revision(folder), "files": file_hashes(folder)},
        "calibration": calibration,
        "settings": {group: config.get(group) for group in SETTINGS},
        "versions": versions(),
        "machine": machine(),
    }


def differences(ours: Any, theirs: Any, name: str = "") -> Iterable[str]:
    """Yield the dotted names of the entries in which two nested dicts differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
    elif ours != theirs:
        yield name


def _revision(folder: Path) -> str | None:
    """Return the commit hash if the folder is a snapshot in the hub's cache, otherwise None."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
