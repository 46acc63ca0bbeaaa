"""Write Python values in Hydra's override syntax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
