"""Where the project's own files are: `conf/` and `kernels/`, the cache for models made here, and folder names."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LONGEST_NAME = 200  # bytes of a folder's name; file systems stop at 255


def bundled(name: str) -> Path:
    """The folder `name` inside an installed wheel, or beside the package in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def cache_folder() -> Path:
    """Models converted or built here: `$HAQ_LAB_CACHE`, else `~/.cache/haq_lab` (XDG)."""
    if override := os.environ.get("HAQ_LAB_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "haq_lab"


def folder_name(overrides: str) -> str:
    """A folder's name from a job's overrides: readable, without separators or blanks, never too long.

    Where that loses something, a short hash follows, so that different overrides never share a folder.
    """
    name = re.sub(r"[^\w.,=+\-\[\]]+", "-", overrides) or "default"
    if name == (overrides or "default") and len(name.encode()) <= LONGEST_NAME:
        return name
    short = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    return f"{short}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
