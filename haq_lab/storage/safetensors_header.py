"""Read the header of a safetensors file. The safetensors library does not report the byte offsets of tensors."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, TypeAdapter
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from haq_lab.storage.json_form import check_form, parse_json

ITEM_BYTES = {
    "BOOL": 1,
    "I8": 1,
    "U8": 1,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "I64": 8,
}  # types that this project writes
LONGEST = 100_000_000  # bytes of a header; the safetensors library has the same limit


class TensorEntry(TypedDict):
    """One tensor of a header."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


_OBJECT = TypeAdapter(dict[str, Any])
_ENTRIES = TypeAdapter(dict[str, TensorEntry])
_METADATA = TypeAdapter(dict[str, str])


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header and the offset of its first tensor (https://huggingface.co/docs/safetensors).

    Args:
        path: The file.

    Returns:
        The `TensorEntry` of each tensor by name, in the order of the offsets, and the text values under
        `__metadata__` if there are any. The number is the offset in bytes.

    Raises:
        ValueError: There is no valid header, a tensor's size does not match its shape, or the tensors do not fill the
            file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LONGEST):
            raise ValueError("its header is longer than the file" if length <= LONGEST else "its header is too long")
        header = parse_json(stream.read(length), _OBJECT)
    metadata = check_form(header.pop("__metadata__", {}), _METADATA)
    entries = check_form(header, _ENTRIES)
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    end = 0
    for name, entry in ordered:
        if entry["dtype"] not in ITEM_BYTES:
            raise ValueError(f"'{name}' has the unsupported type '{entry['dtype'][:20]}'")
        begin, after = entry["data_offsets"]
        if after - begin != math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]:
            raise ValueError(f"the size of '{name}' does not match its shape")
        if begin != end:
            raise ValueError(f"'{name}' does not begin where the previous tensor ends")
        end = after
    if end != size - 8 - length:
        raise ValueError("its tensors do not fill the file")
    return ({"__metadata__": metadata} if metadata else {}) | dict(ordered), 8 + length
