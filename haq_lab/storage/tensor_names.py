"""Parse the names of tensors and modules."""

from __future__ import annotations

import re


def expert_of(name: str) -> int | None:
    """Return the index of the expert that a tensor or module belongs to, or None."""
    match = re.search(r"\.experts\.(\d+)\.", name)
    return int(match[1]) if match else None
