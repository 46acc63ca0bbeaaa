"""Write an expert file that later processes reuse."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch import nn

from haq_lab.offload.tiers.disk import ExpertFile, Packer
from haq_lab.utils.atomic_files import atomic_file, remove_leftovers


class ReusedExpertFile:
    """Writes an expert file, unless a file with the same content exists.

    Each expert is compared with the existing file, byte by byte. At the first difference, a new file is begun with the
    part that is equal. It replaces the existing file when it is complete, so a killed writer changes nothing, and other
    processes go on with the file that they have open.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._packer, self._size = Packer(), 0
        self._resources = ExitStack()
        self._existing: BinaryIO | None = None
        self._new: BinaryIO | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        if path.is_file():
            self._existing = self._resources.enter_context(path.open("rb"))
        else:
            self._begin_new()

    def _begin_new(self) -> BinaryIO:
        """Begin a new file with the bytes of the existing file that were compared."""
        temporary = self._resources.enter_context(atomic_file(self.path))
        self._new = self._resources.enter_context(temporary.open("wb"))
        if self._existing is not None:
            self._existing.seek(0)
            shutil.copyfileobj(self._existing, self._new)
            self._new.seek(self._size)
            self._new.truncate()
        return self._new

    def add(self, experts: nn.ModuleList) -> None:
        """Compare or write the next layer's experts and free their weights.

        Args:
            experts: Experts of the layer.

        Raises:
            UserError: The experts differ in the shapes or types of their tensors.
        """
        for blob in self._packer.pack(experts):
            content = memoryview(cast(Any, blob.numpy()))
            if self._new is None and (self._existing is None or self._existing.read(len(content)) != content.tobytes()):
                self._begin_new()
            if self._new is not None:
                self._new.write(content)
            self._size += len(content)

    def relayout(self, experts: nn.ModuleList) -> None:
        """Return None: the file and the arena use the same layout."""

    def open(self) -> ExpertFile:
        """Return the complete file, with none of its pages in the page cache."""
        if self._new is None and self.path.stat().st_size != self._size:
            self._begin_new()
        self._resources.close()  # a new file replaces the existing one
        expert_file = ExpertFile(self.path, self._packer.parts, self._packer.size, self._packer.experts)
        expert_file.drop_cache()
        return expert_file

    def __exit__(self, *error: object) -> None:
        """Discard a new file that is not complete."""
        self._resources.pop_all().__exit__(RuntimeError, RuntimeError("not complete"), None)
