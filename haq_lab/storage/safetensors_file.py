"""Write and read the safetensors files of a quantised checkpoint.

The tensors of each expert are contiguous (the scales of its three projections, then their weights), so that one read
loads an expert. `byte_range` returns its position. The safetensors library sorts tensors by type, so this module has
its own writer.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from haq_lab.storage.safetensors_header import read_header
from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.errors import UserError

DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16", torch.float32: "F32", torch.bfloat16: "BF16"}
DTYPES |= {torch.float16: "F16", torch.bool: "BOOL", torch.int64: "I64"}
CHUNK = 4 << 20  # bytes that are read and then hashed while they are in the processor's cache
_TYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """A file as the manifest describes it.

    Attributes:
        file: Name of the file.
        bytes: Size of the file.
        sha256: SHA-256 of the file.
        tensors: SHA-256 of each tensor's bytes by its name.
    """

    file: str
    bytes: int
    sha256: str
    tensors: dict[str, str]


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Shard:
    """Write a file atomically. The same tensors always give the same bytes.

    Args:
        path: The file to write.
        tensors: Tensors by name.
        metadata: Text values for the file's header.

    Returns:
        The file's description for the manifest.
    """
    order = _file_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        assert start % tensors[name].itemsize == 0, f"{name} would not be aligned"
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    file_hash = hashlib.sha256()
    hashes = {}
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        for chunk in (struct.pack("<Q", len(header_bytes)), header_bytes):
            stream.write(chunk)
            file_hash.update(chunk)
        for name in order:
            data = _bytes(tensors[name])
            stream.write(data)
            file_hash.update(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
        stream.flush()
        size = stream.tell()
    return Shard(path.name, size, file_hash.hexdigest(), hashes)


def read_shard(folder: Path, shard: Shard, buffer: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file, and check its header and tensors against their hashes.

    Args:
        folder: Folder of the checkpoint.
        shard: The file's description in the manifest.
        buffer: uint8 memory for the file. The tensors are then views of it, so the next file overwrites them. If None,
            each tensor has its own memory.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        UserError: The file is missing, truncated, damaged or not the file of the manifest.
    """
    path = folder / shard.file
    if not path.is_file():
        raise UserError(f"checkpoint: {path} is missing. Copy the whole checkpoint folder.")
    if path.stat().st_size != shard.bytes:
        raise UserError(
            f"checkpoint: {path} has {path.stat().st_size} bytes, not {shard.bytes}. "
            "It is truncated or changed. Write the checkpoint again."
        )
    header, start = read_shard_header(path)
    metadata = header.pop("__metadata__", {})
    for name in sorted({*header} ^ {*shard.tensors}):
        raise UserError(
            f"checkpoint: {path}: tensor '{name}' does not match the manifest. Check whether a file was renamed."
        )
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
    if buffer is None:
        parts = reads = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    else:
        reads = [buffer[: sum(sizes)]]
        parts = [*reads[0].split(sizes)]
    data = dict(zip(header, parts, strict=True))  # in the order of the file
    with path.open("rb") as stream:
        file_hash = hashlib.sha256(stream.read(start))
        for chunk in (chunk for part in reads for chunk in part.split(CHUNK)):
            stream.readinto(_bytes(chunk))
            file_hash.update(_bytes(chunk))
    if file_hash.hexdigest() != shard.sha256:
        raise UserError(f"checkpoint: {path}: {_damage(data, shard)} does not match its hash. The file is damaged.")
    try:
        tensors = {
            name: flat.view(_TYPES[header[name]["dtype"]]).view(header[name]["shape"]) for name, flat in data.items()
        }
    except (KeyError, RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"checkpoint: {path} has a tensor that torch cannot read ({error}). Do not use it.") from error
    return tensors, metadata


def _damage(data: dict[str, Tensor], shard: Shard) -> str:
    """Name what is damaged. A changed shape in the header would give other tensors from the same bytes."""
    for name, part in data.items():
        if hashlib.sha256(_bytes(part)).hexdigest() != shard.tensors[name]:
            return f"tensor '{name}'"
    return "its header"


def describe_shard(path: Path) -> Shard:
    """Return the manifest's description of an existing file.

    Args:
        path: A safetensors file that `write_shard` has written.

    Raises:
        UserError: The file is not a readable safetensors file.
    """
    header, start = read_shard_header(path)
    header.pop("__metadata__", None)
    hashes = {}
    with path.open("rb") as stream:
        file_hash = hashlib.sha256(stream.read(start))
        for name, entry in header.items():
            data = stream.read(entry["data_offsets"][1] - entry["data_offsets"][0])
            file_hash.update(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
    return Shard(path.name, path.stat().st_size, file_hash.hexdigest(), hashes)


def byte_range(path: Path, names: Iterable[str]) -> tuple[int, int]:
    """Return the first byte and the end of a contiguous group of tensors.

    Args:
        path: The file.
        names: Names of the tensors.

    Raises:
        UserError: A tensor does not exist, or the tensors are not contiguous.
    """
    header, start = read_shard_header(path)
    wanted = set(names)
    if missing := wanted - set(header):
        raise UserError(f"checkpoint: {path} has no tensor '{min(missing)}'.")
    ranges = sorted(header[name]["data_offsets"] for name in wanted)
    if any(before[1] != after[0] for before, after in pairwise(ranges)):
        raise UserError(f"checkpoint: {path}: the tensors {min(wanted)} to {max(wanted)} are not contiguous.")
    return start + ranges[0][0], start + ranges[-1][1]


def read_shard_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header and the offset of its first tensor.

    Raises:
        UserError: The file is not a readable safetensors file.
    """
    try:
        return read_header(path)
    except ValueError as error:
        raise UserError(f"checkpoint: {path} is not a readable safetensors file ({error}).") from error


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def _file_order(tensors: dict[str, Tensor]) -> list[str]:
    """Sort tensors by expert, and wide types before narrow ones, so that all are aligned."""

    def key(name: str) -> tuple[int, int]:
        expert = expert_of(name)
        return -1 if expert is None else expert, -tensors[name].itemsize

    return sorted(tensors, key=key)
