"""A user's mistake, told as one clear message: the setting, its value, what is allowed, the nearest match.

Code raises `UserError`; the command line (`cli.py`) prints it and exits with code 2, without a stack trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message names the setting and what would be valid."""


def nearest(value: object, allowed: Iterable[object]) -> str:
    """A hint such as ` (did you mean 'token'?)`, or an empty string where nothing is near."""
    names = [str(item) for item in allowed]
    matches = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def nearest_beside(path: Path) -> str:
    """The hint for a file or folder that is not there: what lies beside it."""
    return nearest(path.name, [item.name for item in path.parent.glob("*")]) if path.parent.is_dir() else ""


def invalid(setting: str, value: object, allowed: Iterable[object]) -> UserError:
    """The error for a setting whose value is none of `allowed`."""
    allowed = list(allowed)
    choices = ", ".join(str(item) for item in allowed)
    return UserError(f"{setting}: '{value}' is not one of {choices}{nearest(value, allowed)}")
