"""Parse the names of tensors and modules."""

from __future__ import annotations

import re

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")


def expert_of(name: str) -> int | None:
    """Return the index of the expert that a tensor or module belongs to, or None."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None
