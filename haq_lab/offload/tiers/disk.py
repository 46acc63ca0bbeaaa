"""The slow tier of a CPU: a file of experts, each one contiguous range of bytes, read with one call.

Experts are written as their modules hold them, in the backend's own weight layout: what is read can be computed
with as it lies. Reads go past the operating system's cache of pages, straight into the fast tier: bytes move from the
disk each time (otherwise the "slow tier" would be RAM), and no processor copies them. Where a file system cannot do
that, and after a use in place, the pages are dropped from the cache.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.utils.errors import UserError

ALIGNMENT = 64  # of every tensor in a blob: a cache line, and what the kernels' vector loads want
PAGE = 4096  # of every blob, in the file and in memory: what a read past the page cache wants
ATTEMPTS = 3
PAUSE = 0.01  # seconds before the second attempt, twice as long before the third


@dataclass(frozen=True)
class Part:
    """One tensor of an expert: `linear.name`, where it lies in the blob, its type and shape."""

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, blob: Tensor) -> Tensor:
        """The tensor as a view of a blob (bytes,) uint8."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return blob[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class ReadError(UserError):
    """An expert could not be read."""


def expert_tensors(expert: nn.Module) -> dict[str, Tensor]:
    """An expert's weights by name. A static input scale stays with the module: all experts' input is quantised by
    it before any of them is chosen."""
    tensors = dict(expert.named_parameters()) | dict(expert.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".input_scale")}


class ExpertFile:
    """The experts of all layers in one file.

    Attributes:
        parts: How an expert's blob is laid out, the same for all.
        blob_bytes: Its size.
    """

    def __init__(self, path: Path, parts: list[Part], blob_bytes: int, experts: int):
        self.path = path
        self.parts = parts
        self.blob_bytes = self.moved_bytes = blob_bytes
        self.staging_bytes = 0
        self.experts = experts
        self._file = os.open(path, os.O_RDONLY)
        self._direct = open_direct(path)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._pages = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)  # writable as torch wants it, never written
        self._map = torch.frombuffer(self._pages, dtype=torch.uint8)

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """An expert's bytes into `blob` (blob_bytes,) uint8, at the beginning of a page.

        A failed or short read is tried again.

        Raises:
            ReadError: It failed `ATTEMPTS` times; the message names the expert.
        """
        view = memoryview(cast(Any, blob.numpy()))
        offset = (layer * self.experts + expert) * self.blob_bytes
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                done = self._pread(view, offset)
            except OSError as error:
                problem = str(error)
                continue
            if done == self.blob_bytes:
                os.posix_fadvise(self._direct, offset, self.blob_bytes, os.POSIX_FADV_DONTNEED)
                return
            problem = f"{done} of {self.blob_bytes} bytes"
        raise ReadError(f"offload: expert {expert} of layer {layer} could not be read from {self.path}: {problem}")

    def _pread(self, view: memoryview, offset: int) -> int:
        """Bytes read, all there are to be had."""
        done = 0
        while done < len(view) and (got := os.preadv(self._direct, [view[done:]], offset + done)):
            done += got
        return done

    def use_in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """The expert on the file itself: computing with it reads the slow tier."""
        offset = (layer * self.experts + number) * self.blob_bytes
        bind(expert, self.parts, self._map[offset : offset + self.blob_bytes])
        return expert

    def end_use(self, experts: Sequence[nn.Module]) -> None:
        """These have run in place: what was read for them leaves memory."""
        for expert in experts:
            bind(expert, self.parts, None)
        self.drop_cache()

    def drop_cache(self) -> None:
        """Take all the file's pages out of memory: what is mapped and was read ahead of it, too."""
        self._pages.madvise(mmap.MADV_DONTNEED)  # first, since the cache keeps what is mapped
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        os.close(self._direct)


def open_direct(path: str | Path) -> int:
    """The file, opened so that reads go past the page cache, if its file system can."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)


class Packer:
    """Lays experts out as blobs, all in the same way.

    Attributes:
        parts: How a blob is laid out; known from the first expert on.
        size: Bytes of a blob.
        experts: In a layer.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.size = self.experts = self._layers = 0

    def pack(self, experts: nn.ModuleList) -> Iterator[Tensor]:
        """The next layer's experts, a blob (size,) uint8 each; an expert's weights leave memory after its blob.

        Raises:
            UserError: Experts differ in their tensors' shapes or types.
        """
        for number, expert in enumerate(experts):
            tensors = expert_tensors(expert)
            parts, size = layout(tensors)
            self.parts, self.size = self.parts or parts, self.size or size
            if parts != self.parts:
                raise UserError(f"offload: expert {number} of layer {self._layers} is not laid out like the others")
            blob = torch.zeros(size, dtype=torch.uint8)
            for part in parts:
                part.of(blob).copy_(tensors[part.name])
            yield blob
            bind(expert, parts, None)
        self.experts, self._layers = len(experts), self._layers + 1


class ExpertFileWriter:
    """Writes a expert_file a layer at a time: `add` each layer's experts, then `open` the expert_file."""

    def __init__(self, path: Path):
        self.path = path
        self._packer = Packer()

    def __enter__(self) -> ExpertFileWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def add(self, experts: nn.ModuleList) -> None:
        """The next layer's experts: into the file, and out of memory.

        Raises:
            UserError: Experts differ in their tensors' shapes or types.
        """
        for blob in self._packer.pack(experts):
            self._stream.write(memoryview(cast(Any, blob.numpy())))

    def relayout(self, experts: nn.ModuleList) -> None:
        """None is needed: the file and the arena hold experts alike."""

    def open(self) -> ExpertFile:
        """The finished expert_file, none of it in the page cache."""
        self._stream.flush()
        os.fsync(self._stream.fileno())  # the cache keeps what is not on the disk yet
        expert_file = ExpertFile(self.path, self._packer.parts, self._packer.size, self._packer.experts)
        expert_file.drop_cache()
        return expert_file


def bind(expert: nn.Module, parts: list[Part], blob: Tensor | None) -> None:
    """Let an expert's modules use the tensors in a blob; None takes them away, so that no stale use goes unnoticed."""
    for part in parts:
        set_tensor(expert, part.name, torch.empty(0, dtype=part.dtype) if blob is None else part.of(blob))


def set_tensor(expert: nn.Module, name: str, tensor: Tensor) -> None:
    """Let an expert's module use a tensor as its parameter or buffer `name`."""
    linear, _, own = name.rpartition(".")
    module = expert.get_submodule(linear)
    if own in module._parameters:
        cast(nn.Parameter, module._parameters[own]).data = tensor
    else:
        module._buffers[own] = tensor


def layout(tensors: dict[str, Tensor]) -> tuple[list[Part], int]:
    """Where each tensor lies in a blob, and the blob's size: whole pages."""
    parts, end = [], 0
    for name, tensor in tensors.items():
        parts.append(Part(name, end, tensor.dtype, tuple(tensor.shape)))
        end = _up(end + tensor.nbytes, ALIGNMENT)
    return parts, _up(end, PAGE)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
