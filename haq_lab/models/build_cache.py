"""Models that are made here: made once, kept in the cache folder, and refused where they are no longer as made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from haq_lab.utils.atomic_files import atomic_folder, cached_sha256, sha256, write_json
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import cache_folder

RECORD = "sha256.json"  # of every other file in the folder


def build_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cache folder `name`, made under a lock if it is not there yet.

    Raises:
        UserError: It was changed since, by a disk or by somebody.
    """
    models = cache_folder() / "models"
    folder = models / name
    if not folder.is_dir():  # else whole, as it was renamed; and a cache that cannot be written to will do
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{name}.lock"):
            if not folder.is_dir():
                say(f"preparing {name}, once; it is kept in {models}")
                with atomic_folder(folder) as aside:
                    make(aside)
                    _record(aside)
    _refuse_changed(folder)
    return folder


def _record(folder: Path) -> None:
    files = [path for path in sorted(folder.iterdir()) if path.name != RECORD]
    write_json(folder / RECORD, {path.name: sha256(path) for path in files})


def _refuse_changed(folder: Path) -> None:
    """Against the record; a model that an earlier version has made has none."""
    if not (folder / RECORD).is_file():
        return
    try:
        record = dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        record = {RECORD: None}
    for name, made in record.items():
        path = folder / name
        if not path.is_file() or cached_sha256(path) != made:
            raise UserError(f"model: '{path}' is not as it was made; remove {folder}, and it is made again")
