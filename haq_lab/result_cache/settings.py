"""The settings of the result cache: `result_cache.enabled`, `result_cache.dir`, `result_cache.max_size`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic.dataclasses import dataclass

from haq_lab.result_cache.eviction import remove_leftovers
from haq_lab.result_cache.store import Store
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import cache_folder
from haq_lab.utils.units import UNITS, parse_quantity


@dataclass(frozen=True)
class ResultCache:
    """Choose whether runs share results, where, and how much disk they may take.

    Args:
        enabled: If false, nothing is read or written. The results are the same.
        dir: Folder of the cache. If null, `stages` in the cache folder.
        max_size: Largest size on disk, such as `20GB`. The least recently used results are removed first.

    Raises:
        UserError: If `dir` is empty or `max_size` is not a size.
    """

    enabled: bool = True
    dir: str | None = None
    max_size: str | int = "20GB"

    def __post_init__(self) -> None:
        if self.dir is not None and not self.dir:
            raise UserError("result_cache.dir: '' is not valid. Name a folder, or choose null.")
        parse_size(self.max_size)

    @property
    def folder(self) -> Path:
        """The absolute path of the cache folder."""
        return cache_folder() / "stages" if self.dir is None else Path(self.dir).expanduser().resolve()

    def open(self) -> Store:
        """Return the store, and remove what killed processes left in its folder.

        The folder is created when the first result is written.
        """
        if self.enabled:
            with suppress(OSError):  # a read-only cache is read nevertheless
                remove_leftovers(self.folder)
        return Store(self.folder, parse_size(self.max_size)) if self.enabled else Store()


def parse_size(limit: str | int) -> int:
    """Convert a size such as `20GB` to bytes.

    Raises:
        UserError: If `limit` is not a size.
    """
    quantity = parse_quantity(limit)
    if quantity is None or quantity[1] not in UNITS:
        raise UserError(f"result_cache.max_size: '{limit}' is not a size. Choose one such as 20GB or 500MiB.")
    return int(quantity[0] * UNITS[quantity[1]])
