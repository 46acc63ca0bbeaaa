"""Build converted and generated models once, store them in the cache folder and verify them before each use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from pydantic import TypeAdapter

from haq_lab.storage.json_form import read_json
from haq_lab.storage.listed_files import ACCEPT, is_inside, loadable_files, unlisted_files
from haq_lab.utils.atomic_files import atomic_folder, cached_sha256, remove_leftovers, sha256, write_json
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import cache_folder

RECORD = "sha256.json"  # hashes of all other files in the folder
_FORM = TypeAdapter(dict[str, str])


def build_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cache folder `name`. Build it first, under a lock, if it does not exist.

    Args:
        name: Name of the folder below `models/` in the cache folder. It must identify the content.
        make: Writes the model's files into the folder that it receives.

    Raises:
        UserError: The folder has no record, or its files are not those of the record.
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
                    record_files(aside)
    _refuse_changed(folder)
    return folder


def record_files(folder: Path) -> list[str]:
    """Write the record of a model folder: the hash of each file that a loader could read.

    Returns:
        The names of the recorded files.
    """
    names = [name for name in loadable_files(folder) if name != RECORD]
    write_json(folder / RECORD, {name: sha256(folder / name) for name in names})
    return names


def _refuse_changed(folder: Path) -> None:
    """Raise UserError if the folder has no record, or if a file was changed, removed or added."""
    rebuild = f"Remove {folder} to build it again, or run `{ACCEPT} {folder}` if you trust its files."
    if not (folder / RECORD).is_file():
        raise UserError(f"model: '{folder}' has no {RECORD}, so its files cannot be checked. {rebuild}")
    try:
        record = read_json(folder / RECORD, _FORM)
    except (OSError, ValueError) as error:
        raise UserError(f"model: '{folder / RECORD}' was changed after it was built. {rebuild}") from error
    for name, recorded in record.items():
        path = folder / name
        if not is_inside(name) or not path.is_file() or cached_sha256(path) != recorded:
            raise UserError(f"model: '{path}' was changed after it was built. {rebuild}")
    for name in unlisted_files(folder, {RECORD, *record}):
        raise UserError(f"model: '{folder / name}' was added after the model was built. {rebuild}")
