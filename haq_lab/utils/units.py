"""Parse sizes such as `20GB`, `6GiB` and `500MB`."""

from __future__ import annotations

import re

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_quantity(text: str | int) -> tuple[float, str] | None:
    """Split a number and its unit.

    Args:
        text: Text such as `6.5 GiB`, `40%` or `7`.

    Returns:
        Number and unit, such as (6.5, "GiB"), (40.0, "%") or (7.0, ""). None if the text has another form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[A-Za-z]*)\s*", str(text))
    return None if match is None else (float(match[1]), match[2])
