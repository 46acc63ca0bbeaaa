"""The table of supported architectures."""

from __future__ import annotations


def families() -> str:
    return "Text."
