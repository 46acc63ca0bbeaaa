"""Sizes as settings write them: `20GB`, `6GiB`, `500MB`."""

from __future__ import annotations

import re

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_quantity(text: str | int) -> tuple[float, str] | None:
    """`6.5 GiB` as (6.5, "GiB"), `40%` as (40.0, "%"), `7` as (7.0, ""); None where that is not its form."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[A-Za-z]*)\s*", str(text))
    return None if found is None else (float(found[1]), found[2])
