"""Where a checkpoint comes from: enough to make it again, and to tell whether half of one may be gone on with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from haq_lab.storage.content_hash import file_hashes
from haq_lab.utils.environment import machine, versions

SETTINGS = ("model", "quantizer", "calibration", "backend")  # groups that decide a checkpoint's bytes


def provenance(folder: Path, label: str, config: dict[str, Any], calibration: dict[str, Any] | None) -> dict[str, Any]:
    """A run's provenance, without times or places, so that the same run gives the same bytes.

    Args:
        folder: The model's.
        config: The run's, resolved.
        calibration: The calibration text's stamp: source, hash, seed.
    """
    return {
        "model": {"label": label, "revision": _revision(folder), "files": file_hashes(folder)},
        "calibration": calibration,
        "settings": {group: config.get(group) for group in SETTINGS},
        "versions": versions(),
        "machine": machine(),
    }


def differences(ours: Any, theirs: Any, name: str = "") -> Iterable[str]:
    """Names of the entries in which two nested dicts differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
    elif ours != theirs:
        yield name


def _revision(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot in the hub's cache."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
