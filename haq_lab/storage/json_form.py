"""Parse JSON that others may have written, and check its form.

pydantic parses it, because the standard library raises RecursionError for deep nesting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

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
    return check_form(from_json(content, allow_inf_nan=False), form)


def check_form(content: Any, form: TypeAdapter[T]) -> T:
    """Check the form of parsed JSON and return it. See `parse_json`."""
    try:
        return form.validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error


def read_json(path: Path, form: TypeAdapter[T]) -> T:
    """Read a JSON file and check its form.

    Raises:
        OSError: The file cannot be read.
        ValueError: See `parse_json`.
    """
    return parse_json(path.read_bytes(), form)


def is_file_name(name: str) -> bool:
    """Return whether a string is the name of a file, without a folder, that every file system accepts."""
    return Path(name).name == name and name != ".." and "\0" not in name and len(name.encode(errors="replace")) < 256
