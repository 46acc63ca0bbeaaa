"""Models are built once, recorded with hashes, and refused after a change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from haq_lab.models.build_cache import build_once
from haq_lab.utils.errors import UserError


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """Build a model with two files in a separate cache."""
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path))
    return build_once("model", _make)


def _make(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(100))
    (folder / "tokenizer.json").write_text("{}")


def _never(folder: Path) -> None:
    raise AssertionError


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 4
    path.write_bytes(content)


CHANGES = {
    "model.safetensors": _flip,
    "tokenizer.json": Path.unlink,
    "sha256.json": lambda path: path.write_text("["),
}


def test_it_is_built_once(made):
    assert build_once("model", _never) == made
    assert set(json.loads((made / "sha256.json").read_text())) == {"model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_refused_until_it_is_rebuilt(made, name):
    CHANGES[name](made / name)
    with pytest.raises(UserError, match=rf"{name}' was changed after it was built. Remove {made} to build it again"):
        build_once("model", _never)
    for path in made.iterdir():
        path.unlink()
    made.rmdir()
    assert build_once("model", _make) == made


def test_a_model_without_a_record_is_not_verified(made):
    (made / "sha256.json").unlink()
    _flip(made / "model.safetensors")
    assert build_once("model", _never) == made
