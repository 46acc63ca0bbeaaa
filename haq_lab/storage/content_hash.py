"""Hash the files that hold a checkpoint folder's weights and config."""

from __future__ import annotations

import re
from pathlib import Path

from haq_lab.utils.atomic_files import sha256_once


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
