"""Store all experts in one file: the slow tier of a CPU. One call reads one expert.

Each expert is stored in the backend's weight layout, so it can be used without conversion. Reads bypass the operating
system's page cache; otherwise the slow tier would be RAM. If the file system does not support that, or after an expert
ran in place, the pages are dropped from the cache.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from haq_lab.utils.atomic_files import naming_path
from haq_lab.utils.errors import UserError

ALIGNMENT = 64  # bytes, of each tensor in a blob: a cache line, as the kernels' vector loads require
PAGE = 4096  # bytes, alignment of blobs in the file and in memory, as direct reads require
ATTEMPTS = 3
PAUSE = 0.01  # seconds before the second attempt; doubled before the third


@dataclass(frozen=True)
class Part:
    """The position, type and shape of one tensor in an expert's blob.

    Attributes:
        name: Name of the tensor in the expert, such as `gate_proj.weight`.
        offset: First byte in the blob.
        dtype: Type of the tensor.
        shape: Shape of the tensor.
    """

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, blob: Tensor) -> Tensor:
        """Return the tensor as a view of a blob, (bytes,) uint8."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return blob[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class Layout(NamedTuple):
    """How the blobs of experts with equal tensor shapes and types are laid out.

    Attributes:
        parts: The tensors.
        size: Bytes of a blob.
    """

    parts: list[Part]
    size: int


@dataclass(frozen=True)
class Layouts:
    """The layouts of all experts' blobs. Experts have several layouts if their linears differ in bits.

    Attributes:
        distinct: The distinct layouts.
        index: (layers, E) index of each expert's layout in `distinct`.
        examples: An expert of each layout. Its weights may be empty.
    """

    distinct: list[Layout]
    index: NDArray[np.int64]
    examples: list[nn.Module]

    def of(self, layer: int, expert: int) -> Layout:
        """Return the layout of an expert."""
        return self.distinct[self.index[layer, expert]]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(layers, E) bytes of each expert's blob."""
        return np.array([layout.size for layout in self.distinct], np.int64)[self.index]

    @property
    def largest(self) -> int:
        """Bytes of the largest blob."""
        return max(layout.size for layout in self.distinct)


class ReadError(UserError):
    """An expert could not be read."""


def expert_tensors(expert: nn.Module) -> dict[str, Tensor]:
    """Return an expert's weights by name.

    A static input scale is left out and stays with the module, because the input is quantised before the router chooses
    experts.
    """
    tensors = dict(expert.named_parameters()) | dict(expert.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".input_scale")}


class ExpertFile:
    """The experts of all layers in one file.

    Args:
        path: The file. The blobs follow one another, layer by layer.
        layouts: Layouts of the blobs.
    """

    def __init__(self, path: Path, layouts: Layouts):
        self.path = path
        self.layouts, self.moved_bytes = layouts, layouts.sizes
        self.staging_bytes = 0
        self._offsets = (np.cumsum(self.moved_bytes) - self.moved_bytes.ravel()).reshape(self.moved_bytes.shape)
        self._file = os.open(path, os.O_RDONLY)
        self._direct = open_direct(path)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._pages = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)  # torch requires a writable buffer
        self._map = torch.frombuffer(self._pages, dtype=torch.uint8)

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """Read an expert. A failed or short read is repeated up to `ATTEMPTS` times in total.

        Args:
            layer: Index of the layer.
            expert: Index of the expert.
            blob: uint8 of the expert's size that starts at a page boundary. It is overwritten.

        Raises:
            ReadError: All attempts failed.
        """
        view = memoryview(cast(Any, blob.numpy()))
        offset, size = int(self._offsets[layer, expert]), len(view)
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                done = self._pread(view, offset)
            except OSError as error:
                problem = str(error)
                continue
            if done == size:
                os.posix_fadvise(self._direct, offset, size, os.POSIX_FADV_DONTNEED)
                return
            problem = f"{done} of {size} bytes"
        raise ReadError(
            f"offload: expert {expert} of layer {layer} could not be read from {self.path} ({problem}). Check the disk."
        )

    def _pread(self, view: memoryview, offset: int) -> int:
        """Read until the view is full or the file ends, and return the number of bytes."""
        done = 0
        while done < len(view) and (got := os.preadv(self._direct, [view[done:]], offset + done)):
            done += got
        return done

    def use_in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """Bind the expert to the mapped file, so that computing with it reads from the disk."""
        offset, layout = int(self._offsets[layer, number]), self.layouts.of(layer, number)
        bind(expert, layout.parts, self._map[offset : offset + layout.size])
        return expert

    def end_use(self, experts: Sequence[nn.Module]) -> None:
        """Unbind the experts that ran in place, and drop their pages from memory."""
        for expert in experts:
            unbind(expert)
        self.drop_cache()

    def drop_cache(self) -> None:
        """Drop all of the file's pages from memory, mapped and read-ahead ones included."""
        self._pages.madvise(mmap.MADV_DONTNEED)  # first, because the cache keeps mapped pages
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        os.close(self._direct)


def open_direct(path: str | Path) -> int:
    """Open a file for reads that bypass the page cache, if the file system supports it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)


class Packer:
    """Packs experts into blobs and keeps their layouts."""

    def __init__(self) -> None:
        self._distinct: list[Layout] = []
        self._index: list[list[int]] = []
        self._examples: list[nn.Module] = []

    @property
    def layouts(self) -> Layouts:
        """The layouts of the experts so far."""
        return Layouts(self._distinct, np.array(self._index, np.int64), self._examples)

    def pack(self, experts: nn.ModuleList) -> Iterator[Tensor]:
        """Yield a blob, uint8, for each expert of the next layer, and free the expert's weights.

        Args:
            experts: Experts of the layer.
        """
        self._index.append([])
        for expert in experts:
            tensors = expert_tensors(expert)
            own = layout(tensors)
            if own not in self._distinct:
                self._distinct.append(own)
                self._examples.append(expert)
            self._index[-1].append(self._distinct.index(own))
            blob = torch.zeros(own.size, dtype=torch.uint8)
            for part in own.parts:
                part.of(blob).copy_(tensors[part.name])
            yield blob
            unbind(expert)


class ExpertFileWriter:
    """Writes an expert file one layer at a time.

    Args:
        path: The file to write.

    Example:
        >>> with ExpertFileWriter(path) as writer:  # doctest: +SKIP
        ...     for layer in layers:
        ...         writer.add(layer.mlp.experts)
        ...     expert_file = writer.open()
    """

    def __init__(self, path: Path):
        self.path = path
        self._packer = Packer()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        with naming_path(self.path):  # closing writes what is still buffered
            self._stream.close()

    def add(self, experts: nn.ModuleList) -> None:
        """Write the next layer's experts and free their weights.

        Args:
            experts: Experts of the layer.
        """
        for blob in self._packer.pack(experts):
            self._write(memoryview(cast(Any, blob.numpy())))

    def _write(self, blob: memoryview) -> None:
        self._stream.write(blob)

    def relayout(self, experts: nn.ModuleList) -> None:
        """Return None: the file and the arena use the same layout."""

    def open(self) -> ExpertFile:
        """Return the complete file, with none of its pages in the page cache."""
        self._complete()
        expert_file = ExpertFile(self.path, self._packer.layouts)
        expert_file.drop_cache()
        return expert_file

    def _complete(self) -> None:
        """Bring all bytes to the disk. The page cache cannot drop pages that are not there yet."""
        self._stream.flush()
        os.fsync(self._stream.fileno())


def bind(expert: nn.Module, parts: list[Part], blob: Tensor) -> None:
    """Point an expert's parameters and buffers at a blob."""
    for part in parts:
        set_tensor(expert, part.name, part.of(blob))


def unbind(expert: nn.Module) -> None:
    """Replace an expert's parameters and buffers by empty tensors, so stale use fails."""
    for name, tensor in expert_tensors(expert).items():
        set_tensor(expert, name, torch.empty(0, dtype=tensor.dtype))


def set_tensor(expert: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer `name` of an expert's module."""
    linear, _, tensor_name = name.rpartition(".")
    module = expert.get_submodule(linear)
    if tensor_name in module._parameters:
        cast(nn.Parameter, module._parameters[tensor_name]).data = tensor
    else:
        module._buffers[tensor_name] = tensor


def layout(tensors: dict[str, Tensor]) -> Layout:
    """Compute the layout of a blob. Its size is a multiple of the page size.

    Args:
        tensors: Tensors of one expert by name.
    """
    parts, end = [], 0
    for name, tensor in tensors.items():
        parts.append(Part(name, end, tensor.dtype, tuple(tensor.shape)))
        end = _round_up(end + tensor.nbytes, ALIGNMENT)
    return Layout(parts, _round_up(end, PAGE))


def _round_up(size: int, multiple: int) -> int:
    """Round `size` up to a multiple."""
    return -(-size // multiple) * multiple
