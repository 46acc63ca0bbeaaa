"""Parse JSON that others may have written, and check its form.

pydantic parses it, because the standard library raises RecursionError for deep nesting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def parse_json(content: bytes | str, form: TypeAdapter[T]) -> T:
    """Parse JSON and check its form.

    Args:
        content: The JSON.
        form: Expected form. Types are not converted.

    Raises:
        ValueError: The content is not JSON, is nested too deeply, or has another form. The message is one line.

    Example:
        >>> parse_json('{"a": 1}', TypeAdapter(dict[str, int]))
        {'a': 1}
    """
    try:
        return form.validate_json(content, strict=True)
    except ValidationError as error:
        raise _in_one_line(error) from error


def check_form(content: Any, form: TypeAdapter[T]) -> T:
    """Check the form of a part of parsed JSON and return it. See `parse_json`."""
    try:
        return form.validate_python(content, strict=True)
    except ValidationError as error:
        raise _in_one_line(error) from error


def read_json(path: Path, form: TypeAdapter[T]) -> T:
    """Read a JSON file and check its form.

    Raises:
        OSError: The file cannot be read.
        ValueError: See `parse_json`.
    """
    return parse_json(path.read_bytes(), form)


def is_file_name(name: str) -> bool:
    """Return whether a string is the name of a file, without a folder, that every file system accepts."""
    is_plain = Path(name).name == name and name not in ("", "..") and "\0" not in name
    return is_plain and len(name.encode(errors="replace")) < 256


def _in_one_line(error: ValidationError) -> ValueError:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return ValueError(f"{place}: {first['msg']}" if place else first["msg"])
