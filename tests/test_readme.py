"""The README's map: no folder, package or config group is missing from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else ""
ROWS = re.findall(r"^\| (`.*?) \| (.*) \|$", TEXT, flags=re.MULTILINE)


def _named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def _places() -> dict[str, str]:
    """By each row's places, in full, what the row says."""
    places = {}
    for place, what in ROWS:
        names = re.findall(r"`([^`]+)`", place)
        folder = names[0].rpartition("/")[0] if not names[0].endswith("/") else names[0].rstrip("/").rpartition("/")[0]
        for name in names:
            places[name if "/" in name.rstrip("/") or not folder else f"{folder}/{name}"] = what
    return places


def _packages() -> list[str]:
    return sorted(f"haq_lab/{path.parent.name}/" for path in (ROOT / "haq_lab").glob("*/__init__.py"))


@pytest.mark.parametrize("package", _packages())
def test_every_package_is_on_the_map(package):
    assert package in _places(), "README: What is where"


def test_every_folder_is_on_the_map():
    places = {place.split("/")[0] for place in _places()}
    hidden = {"build", "dist", "runs"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))} - hidden
    assert folders - places == set()


def test_the_map_names_nothing_that_is_not_there():
    assert [place for place in _places() if not (ROOT / place).exists()] == []


def test_every_group_is_on_the_map():
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra"}
    assert groups - _named(_places()["conf/"]) == set()
