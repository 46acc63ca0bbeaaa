"""The settings of the stages' store: `stages.use`, `stages.dir`, `stages.limit`."""

from __future__ import annotations

from pathlib import Path

from pydantic.dataclasses import dataclass

from haq_lab.result_cache.store import Store
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import cache_folder
from haq_lab.utils.units import UNITS, number_and_unit


@dataclass(frozen=True)
class Stages:
    """Args:
    use: Whether anything is kept and found; the results are the same without.
    dir: The store's folder; null takes `stages` in the cache folder.
    limit: What it may take on disk, as `20GB`; what was unused for longest goes first.
    """

    use: bool = True
    dir: str | None = None
    limit: str | int = "20GB"

    def __post_init__(self) -> None:
        if self.dir is not None and not self.dir:
            raise UserError("stages.dir: '' is not valid; name a folder, or null")
        bytes_of(self.limit)

    @property
    def folder(self) -> Path:
        return cache_folder() / "stages" if self.dir is None else Path(self.dir).expanduser().resolve()

    def open(self) -> Store:
        """The store, made when something is first kept."""
        return Store(self.folder, bytes_of(self.limit)) if self.use else Store()


def bytes_of(limit: str | int) -> int:
    """`20GB` as bytes. Raises `UserError` for what is no size."""
    found = number_and_unit(limit)
    if found is None or found[1] not in UNITS:
        raise UserError(f"stages.limit: '{limit}' is no size as '20GB' or '500MiB'")
    return int(found[0] * UNITS[found[1]])
