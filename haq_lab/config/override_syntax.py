"""Write Python values and paths in Hydra's override syntax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


def override_value(value: Any) -> str:
    """Return a value as the right side of an override. Strings are quoted, because a path may have any character.

    Args:
        value: A string, a path, or a value that JSON can represent.

    Example:
        >>> override_value("40%")
        "'40%'"
    """
    if isinstance(value, str | Path):
        escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return json.dumps(value)


class Spelling(NamedTuple):
    """The overrides for a path or a hub name.

    Attributes:
        option: The option of the group, such as `model=hf`.
        setting: The setting that takes the path or name, such as `model.name`.
    """

    option: str
    setting: str


def spelling_of_path(group: str, value: str) -> Spelling | None:
    """Return the overrides that take a path or a hub name, which a user may give in place of an option.

    Args:
        group: `model`, `data` or `calibration`. Other groups take no paths.
        value: What the user gave.

    Returns:
        The option and the setting, or None if the value is neither a path nor a hub name.

    Example:
        >>> spelling_of_path("model", "mistralai/Mixtral-8x7B-v0.1")
        Spelling(option='model=hf', setting='model.name')
    """
    path = Path(value).expanduser()
    is_path = "/" in value or bool(value and path.exists())
    if group == "data" and (is_path or path.suffix):
        return Spelling("data=text", "data.text.path")
    if group == "calibration" and (is_path or path.suffix):
        return Spelling("calibration=text", "calibration.path")
    if group != "model":
        return None
    if path.suffix == ".gguf":
        return Spelling("model=gguf", "model.path")
    if (path / "manifest.json").is_file():
        return Spelling("model=quantized", "model.path")
    return Spelling("model=hf", "model.name") if is_path else None
