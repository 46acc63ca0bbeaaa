"""Test the parsing of sizes."""

from __future__ import annotations

import pytest

from haq_lab.utils.units import parse_quantity


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("6.5 GiB", (6.5, "GiB")),
        (" 40% ", (40.0, "%")),
        (7, (7.0, "")),
        ("0B", (0.0, "B")),
        ("-1", None),
        ("1e3", None),
        ("GB", None),
        ("", None),
    ],
)
def test_a_number_and_its_unit(text, read):
    assert parse_quantity(text) == read
