"""Check the lengths in the header of a GGUF file, because the gguf package loops over them without a bound."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: the size of each scalar type by its number
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def check_lengths(path: Path) -> None:
    """Check that the metadata of a GGUF file ends before the file does.

    Args:
        path: A file that begins with `GGUF`.

    Raises:
        ValueError: A value has an unknown type, is nested, or is longer than the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(8)  # magic and version
        _, values = _numbers(stream, "<QQ")
        for _ in range(values):  # ends at the end of the file
            _skip_string(stream, size)
            (kind,) = _numbers(stream, "<I")
            _skip_value(stream, kind, size)


def _skip_value(stream: BinaryIO, kind: int, size: int) -> None:
    count = 1
    if kind == ARRAY:
        kind, count = _numbers(stream, "<IQ")
    if kind == STRING:
        for _ in range(count):  # ends at the end of the file
            _skip_string(stream, size)
    elif kind in SCALAR_BYTES:
        _skip(stream, count * SCALAR_BYTES[kind], size)
    else:
        raise ValueError(f"a value has the unsupported type {kind}")


def _skip_string(stream: BinaryIO, size: int) -> None:
    _skip(stream, _numbers(stream, "<Q")[0], size)


def _skip(stream: BinaryIO, count: int, size: int) -> None:
    if stream.tell() + count > size:
        raise ValueError("its header is longer than the file")
    stream.seek(count, 1)


def _numbers(stream: BinaryIO, layout: str) -> tuple[int, ...]:
    content = stream.read(struct.calcsize(layout))
    if len(content) < struct.calcsize(layout):
        raise ValueError("its header is longer than the file")
    return struct.unpack(layout, content)
