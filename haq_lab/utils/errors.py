"""Define the error that users can correct, and build its message: the setting, its value, and what is allowed.

The command line (`cli/`) prints a `UserError` without a stack trace and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """An error that the user can correct. The message names the setting and what to do."""


def nearest(value: object, allowed: Iterable[object]) -> str:
    """Return a hint such as ` (did you mean 'token'?)`, or an empty string if no allowed value is similar.

    Args:
        value: What the user wrote.
        allowed: Values to choose from.
    """
    names = {str(item).lower(): str(item) for item in allowed}
    matches = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    return f" (did you mean '{names[matches[0]]}'?)" if matches else ""


def nearest_beside(path: Path) -> str:
    """Return the same hint for a file or folder that does not exist, from the names in its parent folder."""
    return nearest(path.name, [item.name for item in path.parent.glob("*")]) if path.parent.is_dir() else ""


def invalid(setting: str, value: object, allowed: Iterable[object]) -> UserError:
    """Return the error for a setting whose value is not allowed.

    Args:
        setting: Full name of the setting.
        value: Its value.
        allowed: Allowed values.

    Example:
        >>> str(invalid("quantizer.activations", "tokn", ["token", "tensor"]))
        "quantizer.activations: 'tokn' is not one of token, tensor (did you mean 'token'?)"
    """
    allowed = list(allowed)
    choices = ", ".join(str(item) for item in allowed)
    return UserError(f"{setting}: '{value}' is not one of {choices}{nearest(value, allowed) or '.'}")


def unknown_setting(setting: str, known: Iterable[str]) -> UserError:
    """Return the error for a setting that does not exist.

    Args:
        setting: Full name of the setting.
        known: Last parts of the names that exist beside it.

    Example:
        >>> str(unknown_setting("quantizer.bits", ["weight_bits", "fold"]))
        "quantizer.bits: there is no such setting (did you mean 'weight_bits'?)"
    """
    known = sorted(set(known))
    parent, _, name = setting.rpartition(".")
    choices = f". Choose one of {', '.join(known)}." if known else f". Remove it: {parent} has no settings."
    return UserError(f"{setting}: there is no such setting{nearest(name, known) or choices}")


def renamed(setting: str, new_name: str) -> UserError:
    """Return the error for a setting that has a new name."""
    return UserError(f"{setting}: there is no such setting any more. Use {new_name}.")
