"""Locate the project's files and the cache folder, and build folder names."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255


def bundled(name: str) -> Path:
    """Return a folder of the project, such as `conf` or `kernels`.

    It lies inside the package in an installed wheel, and beside the package in a checkout.

    Args:
        name: Name of the folder.
    """
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def cache_folder() -> Path:
    """Return the folder for converted or built models: `$HAQ_LAB_CACHE`, or `~/.cache/haq_lab` (XDG)."""
    if override := os.environ.get("HAQ_LAB_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "haq_lab"


def folder_name(overrides: str) -> str:
    """Return a folder name for a job's overrides: readable, without separators or spaces, and of limited length.

    If the name does not contain all of the overrides, a short hash is added. So different overrides never share a
    folder.

    Args:
        overrides: Overrides of the job, such as `quantizer=rtn,model=tiny_llama`.
    """
    name = re.sub(r"[^\w.,=+\-\[\]]+", "-", overrides) or "default"
    if name == (overrides or "default") and len(name.encode()) <= LONGEST_NAME:
        return name
    short = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    return f"{short}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
