"""Where a checkpoint comes from: enough to make it again, and to tell whether half of one may be gone on with."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from haq_lab.files import sha256_once

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


def versions() -> dict[str, str]:
    """Of what computes, and of what writes the files."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def machine() -> dict[str, Any]:
    """What the last bits of floating-point sums depend on."""
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def differences(ours: Any, theirs: Any, name: str = "") -> Iterable[str]:
    """Names of the entries in which two nested dicts differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
    elif ours != theirs:
        yield name


def content_files(folder: Path) -> list[Path]:
    """A checkpoint folder's weights and its config."""
    return sorted([*folder.glob("*.safetensors"), folder / "config.json"])


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the content files. The hub's cache names large files by it, which spares reading 93 GB."""
    hashes = {}
    for path in content_files(folder):
        name = path.resolve().name
        hashes[path.name] = name if re.fullmatch(r"[0-9a-f]{64}", name) else sha256_once(path)
    return hashes


def _revision(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot in the hub's cache."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
