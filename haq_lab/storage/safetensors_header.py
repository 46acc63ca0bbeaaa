"""The header of a safetensors file by itself: the library gives tensors, and does not tell where they lie."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

ITEM_BYTES = {"BOOL": 1, "I8": 1, "U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}  # of the types that we write


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header (https://huggingface.co/docs/safetensors), and where the tensors' bytes begin.

    Raises:
        ValueError: It is none, is cut off, or has a tensor of another size than its shape.
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
                    raise ValueError(f"'{name}' has another size than its shape")
    except (struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    return header, 8 + length
