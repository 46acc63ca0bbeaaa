"""Read an expert's number from the name of a tensor or module."""

from __future__ import annotations

import re


def expert_of(name: str) -> int | None:
    """The expert in whose part of the layer a module is; None where it is in none."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else None
