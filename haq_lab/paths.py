"""Where the project's own files are: `conf/` and `kernels/`, and the cache for models made here."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent


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
