"""Room for hidden states: in RAM while there is enough, beyond it in files that are mapped into memory.

The calibration and evaluation tokens go through the model layer by layer, so their hidden states are all that
stays between two layers. Of 128 windows of 2,048 tokens at Mixtral's width that is 4.3 GB in float32, a level.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import cache_folder

RAM_BYTES = 2 << 30


class HiddenStateBuffer:
    """Hands out tensors; those past `limit` bytes in all lie in unnamed files, gone once they are let go.

    Args:
        limit: Bytes that are kept in RAM.
        folder: Where the files go, the cache folder by default: `/tmp` is often RAM itself.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        self._left = RAM_BYTES if limit is None else limit
        self._folder = folder
        self._maps: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor to be written to. Raises `UserError` where the disk has no room for it."""
        size = math.prod(shape) * dtype.itemsize
        if size <= self._left or size == 0:
            self._left -= size
            return torch.empty(shape, dtype=dtype)
        folder = self._folder or cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # writing to a mapped hole on a full disk kills the process
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise UserError(f"{folder}: no room for {size / 1e9:.1f} GB of hidden states ({error})") from error
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in this spool."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def release(self) -> None:
        """Let the mapped files' pages leave this process's memory; the system writes them out when it must."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
