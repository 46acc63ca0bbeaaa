"""One safetensors file of a quantised checkpoint, its tensors in an order of our own.

The format leaves the order open; its library sorts by dtype and cannot be told otherwise, hence the writer here.
Each expert's tensors (the scales of its gate, up and down projection, then their levels) lie side by side, so that
an offloading engine can read an expert as one range of bytes: `byte_range` says which.
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

DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """A file as the manifest has it: its size in bytes, its SHA-256, and that of every tensor's bytes."""

    file: str
    bytes: int
    sha256: str
    tensors: dict[str, str]


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Shard:
    """Write `path` whole or not at all. The same tensors give the same bytes."""
    order = _in_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        assert start % tensors[name].itemsize == 0, f"{name} would not be aligned"
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    whole = hashlib.sha256()
    hashes = {}
    with atomic_file(path) as aside, aside.open("wb") as stream:
        for chunk in (struct.pack("<Q", len(head)), head):
            stream.write(chunk)
            whole.update(chunk)
        for name in order:
            data = _bytes(tensors[name])
            stream.write(data)
            whole.update(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
        stream.flush()
        size = stream.tell()
    return Shard(path.name, size, whole.hexdigest(), hashes)


def read_shard(folder: Path, shard: Shard) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A shard's tensors, each checked against its hash, and its metadata.

    Raises:
        UserError: Names the file, and the tensor where one is to blame.
    """
    path = folder / shard.file
    if not path.is_file():
        raise UserError(f"checkpoint: {path} is missing")
    if path.stat().st_size != shard.bytes:
        raise UserError(f"checkpoint: {path} has {path.stat().st_size} bytes, not {shard.bytes}: truncated or changed")
    header, start = header_of(path)
    metadata = header.pop("__metadata__", {})
    for name in sorted({*header} ^ {*shard.tensors}):
        raise UserError(f"checkpoint: {path}: tensor '{name}' is not where the manifest has it; was a file renamed?")
    tensors = {}
    with path.open("rb") as stream:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            stream.seek(start + begin)
            data = torch.empty(end - begin, dtype=torch.uint8)
            stream.readinto(_bytes(data))
            if hashlib.sha256(_bytes(data)).hexdigest() != shard.tensors[name]:
                raise UserError(f"checkpoint: {path}: tensor '{name}' does not match its hash; the file is damaged")
            tensors[name] = data.view(_TYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata


def byte_range(path: Path, names: Iterable[str]) -> tuple[int, int]:
    """Where in the file the named tensors lie, first byte and end; together they fill it without a gap.

    Raises:
        UserError: They don't lie side by side, or are not there.
    """
    header, start = header_of(path)
    wanted = set(names)
    if missing := wanted - set(header):
        raise UserError(f"checkpoint: {path} has no tensor '{min(missing)}'")
    ranges = sorted(header[name]["data_offsets"] for name in wanted)
    if any(before[1] != after[0] for before, after in pairwise(ranges)):
        raise UserError(f"checkpoint: {path}: the tensors of {min(wanted)} and others do not lie side by side")
    return start + ranges[0][0], start + ranges[-1][1]


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """A shard's header, and where the tensors' bytes begin. Raises `UserError` for what is none."""
    try:
        return read_header(path)
    except ValueError as error:
        raise UserError(f"checkpoint: {path} is not a readable safetensors file ({error})") from error


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def _in_order(tensors: dict[str, Tensor]) -> list[str]:
    """Wide numbers before narrow ones, which keeps them aligned; within an expert too, one expert after the other."""

    def key(name: str) -> tuple[int, int]:
        expert = expert_of(name)
        return -1 if expert is None else expert, -tensors[name].itemsize

    return sorted(tensors, key=key)
