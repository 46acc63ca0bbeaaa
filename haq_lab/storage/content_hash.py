"""Hash the files that hold a checkpoint folder's weights and config."""

from __future__ import annotations

from pathlib import Path

from haq_lab.storage.weight_files import weight_files
from haq_lab.utils.atomic_files import cached_sha256
from haq_lab.utils.errors import UserError


def content_files(folder: Path) -> list[Path]:
    """Return the weight files that would be read, and config.json."""
    try:
        weights = weight_files(folder).read
    except UserError:  # a quantised checkpoint: its manifest names the files
        weights = list(folder.glob("*.safetensors"))
    return sorted([*weights, folder / "config.json"])


def file_hashes(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of each content file by its name. Hashes in the hub cache's file names are not trusted."""
    return {path.name: cached_sha256(path) for path in content_files(folder)}
