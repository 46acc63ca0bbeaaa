"""Build converted and generated models once, store them in the cache folder and verify them before each use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from haq_lab.utils.atomic_files import atomic_folder, cached_sha256, remove_leftovers, sha256, write_json
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import cache_folder

RECORD = "sha256.json"  # hashes of all other files in the folder


def build_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cache folder `name`. Build it first, under a lock, if it does not exist.

    Args:
        name: Name of the folder below `models/` in the cache folder. It must identify the content.
        make: Writes the model's files into the folder that it receives.

    Raises:
        UserError: A file of the folder is missing or was changed after the build.
    """
    models = cache_folder() / "models"
    folder = models / name
    remove_leftovers(models)
    if not folder.is_dir():  # an existing folder is complete, and then a read-only cache suffices
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{name}.lock"):
            if not folder.is_dir():
                say(f"preparing {name} (only once, stored in {models})")
                with atomic_folder(folder) as aside:
                    make(aside)
                    _record(aside)
    _refuse_changed(folder)
    return folder


def _record(folder: Path) -> None:
    files = [path for path in sorted(folder.iterdir()) if path.name != RECORD]
    write_json(folder / RECORD, {path.name: sha256(path) for path in files})


def _refuse_changed(folder: Path) -> None:
    """Raise UserError if a file differs from its recorded hash. Models of earlier versions have no record."""
    if not (folder / RECORD).is_file():
        return
    try:
        record = dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        record = {RECORD: None}
    for name, recorded in record.items():
        path = folder / name
        if not path.is_file() or cached_sha256(path) != recorded:
            raise UserError(f"model: '{path}' was changed after it was built. Remove {folder} to build it again.")
