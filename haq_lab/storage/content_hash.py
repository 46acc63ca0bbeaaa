"""Hash the files that hold a checkpoint folder's weights and config."""

from __future__ import annotations

from pathlib import Path

from haq_lab.storage.weight_files import weight_files
from haq_lab.utils.atomic_files import sha256_once
from haq_lab.utils.errors import UserError


def content_files(folder: Path) -> list[Path]:
    """Return the weight files that would be read, and the config."""
    try:
        weights = weight_files(folder).read
    except UserError:  # a quantised checkpoint, whose manifest names its files
        weights = list(folder.glob("*.safetensors"))
    return sorted([*weights, folder / "config.json"])


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each content file by its name. Names in the hub's cache are not trusted."""
    return {path.name: sha256_once(path) for path in content_files(folder)}
