"""The README's map: no folder, module, config group or notebook page is missing from it."""

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
    """By each row's places, in full, what the row says. `haq_lab/a.py`, `b.py` stand for two files of haq_lab/."""
    places = {}
    for place, what in ROWS:
        names = re.findall(r"`([^`]+)`", place)
        folder = names[0].rpartition("/")[0] if not names[0].endswith("/") else names[0].rstrip("/").rpartition("/")[0]
        for name in names:
            places[name if "/" in name.rstrip("/") or not folder else f"{folder}/{name}"] = what
    return places


def _modules() -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "haq_lab").rglob("*.py") if not path.name.startswith("__"))


@pytest.mark.parametrize("module", _modules(), ids=str)
def test_every_module_is_on_the_map(module):
    """By its own row, or named in that of its package."""
    places = _places()
    assert str(module) in places or module.stem in _named(places.get(f"{module.parent}/", "")), "README: What is where"


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
