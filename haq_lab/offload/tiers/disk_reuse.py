"""Write an expert file that later processes reuse."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

from haq_lab.offload.tiers.disk import ExpertFileWriter
from haq_lab.utils.atomic_files import atomic_file, remove_leftovers

PIECE = 2**24  # bytes copied at a time


class ReusedExpertFile(ExpertFileWriter):
    """Writes an expert file, unless a file with the same content exists.

    Each expert is compared with the existing file, byte by byte. At the first difference, a new file is begun with the
    part that is equal. It replaces the existing file when it is complete, so a killed writer changes nothing, and other
    processes go on with the file that they have open.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._size = 0  # bytes of the blobs so far
        self._resources = ExitStack()
        self._existing: BinaryIO | None = None
        self._new: BinaryIO | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path.parent)
        if self.path.is_file():
            self._existing = self._resources.enter_context(self.path.open("rb"))
        else:
            self._begin_new()
        return self

    def __exit__(self, *error: object) -> None:
        """Discard a new file that is not complete."""
        self._resources.pop_all().__exit__(RuntimeError, RuntimeError("not complete"), None)

    def _write(self, blob: memoryview) -> None:
        if self._new is None and (self._existing is None or self._existing.read(len(blob)) != blob):
            self._begin_new()
        if self._new is not None:
            self._new.write(blob)
        self._size += len(blob)

    def _complete(self) -> None:
        if self._new is None and self.path.stat().st_size != self._size:
            self._begin_new()
        self._resources.close()  # flushes the new file, which replaces the existing one

    def _begin_new(self) -> None:
        """Begin a new file with the bytes of the existing file that were compared."""
        temporary = self._resources.enter_context(atomic_file(self.path))
        self._new = self._resources.enter_context(temporary.open("wb"))
        if self._existing is not None:
            self._existing.seek(0)
            for begin in range(0, self._size, PIECE):
                self._new.write(self._existing.read(min(PIECE, self._size - begin)))
