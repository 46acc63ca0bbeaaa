"""Allocate hidden states in RAM up to a limit, and beyond it in memory-mapped files.

The sequential pipeline runs all calibration and evaluation tokens through one layer before the next. Their hidden
states are all that is kept between two layers: 4.3 GB in float32 for 128 windows of 2,048 tokens at Mixtral's width.
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
    """Allocates tensors. Tensors beyond the limit lie in unnamed temporary files, which disappear when they are freed.

    Args:
        limit: Bytes to allocate in RAM. None is 2 GiB.
        folder: Folder for the files. None is the cache folder, because `/tmp` is often RAM.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        self._left = RAM_BYTES if limit is None else limit
        self._folder = folder
        self._maps: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate a tensor without initialising it.

        Args:
            shape: Shape of the tensor.
            dtype: Type of the tensor.

        Raises:
            UserError: The disk is full.
        """
        size = math.prod(shape) * dtype.itemsize
        if size <= self._left or size == 0:
            self._left -= size
            return torch.empty(shape, dtype=dtype)
        folder = self._folder or cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Reserve the space now, because writing to a mapped file on a full disk kills the process.
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise UserError(
                f"{folder}: no room for {size / 1e9:.1f} GB of hidden states ({error}). "
                "Free disk space or set HAQ_LAB_CACHE to a folder on another disk."
            ) from error
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of `tensor` in this buffer."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def release(self) -> None:
        """Drop the pages of the mapped files from memory. Their contents stay in the files."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
