"""Models are built once, recorded with hashes, and refused after a change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.checkpoint.accept import accept
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


PLANTED = [
    "added_tokens.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
    "chat_template.jinja",
    "generation_config.json",
    "adapter_config.json",
    "vocab.txt",
    "additional_chat_templates/tools.jinja",
]


@pytest.mark.parametrize("name", PLANTED)
def test_an_added_file_is_refused_until_it_is_accepted(made, name):
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_text("{}")
    with pytest.raises(UserError, match=rf"{name}' was added after .*python -m haq_lab.checkpoint accept {made}"):
        build_once("model", _never)
    (made / "config.json").write_text("{}")
    assert name in accept(made)
    assert build_once("model", _never) == made


@pytest.mark.parametrize("name", ["README.md", "notes.txt", ".DS_Store"])
def test_documents_may_be_added(made, name):
    (made / name).write_text("text")
    assert build_once("model", _never) == made


def test_a_model_without_a_record_is_refused_until_it_is_accepted(made):
    (made / "sha256.json").unlink()
    with pytest.raises(UserError, match=rf"has no sha256.json.*run `python -m haq_lab.checkpoint accept {made}`"):
        build_once("model", _never)
    (made / "config.json").write_text("{}")
    assert accept(made) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert build_once("model", _never) == made


def test_only_a_model_can_be_accepted(tmp_path):
    with pytest.raises(UserError, match=r"has no readable config\.json"):
        accept(tmp_path)


@given(content=st.one_of(st.binary(max_size=80), st.just(b"[" * 50_000), st.just(b'{"../other": "0"}')))
def test_any_record_is_matched_or_refused(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAQ_LAB_CACHE", str(folder))
        made = build_once("model", _make)
        (made / "sha256.json").write_bytes(content)
        with pytest.raises(UserError, match=r"^model: '.*(was changed|was added) after"):
            build_once("model", _never)
