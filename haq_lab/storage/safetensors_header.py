"""Read the header of a safetensors file. The safetensors library does not report the byte offsets of tensors."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

# Types that this project writes.
ITEM_BYTES = {"BOOL": 1, "I8": 1, "U8": 1, "U16": 2, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header and the offset of its first tensor (https://huggingface.co/docs/safetensors).

    Args:
        path: The file.

    Raises:
        ValueError: There is no valid header, or a tensor's size does not match its shape.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                size = math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
                if entry["data_offsets"][1] - entry["data_offsets"][0] != size:
                    raise ValueError(f"the size of '{name}' does not match its shape")
    except (struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    return header, 8 + length
