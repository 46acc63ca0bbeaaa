"""Checkpoints are written only to usable folders, and files of others are never changed."""

from __future__ import annotations

import json
import re

import pytest
from launching import TINY, launch
from rich.progress import Progress as Bars

from haq_lab.checkpoint.manifest import FILE
from haq_lab.checkpoint.model_card import CARD
from haq_lab.checkpoint.writer import CheckpointWriter


def _write(folder, at, *more):
    return launch(*TINY, f"hydra.run.dir='{at / 'run'}'", f"checkpoint.dir='{folder}'", *more)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("file", "checkpoint.dir: '.*file' cannot be created: "),
        ("file/below", "checkpoint.dir: '.*below' cannot be created: Not a directory at "),
        ("/proc/nowhere", "checkpoint.dir: '/proc/nowhere' cannot be created: "),
        ("", "checkpoint.dir: '' is not valid. Name a folder, or null"),
        ("none/../full", "checkpoint.dir: '.*full' is not empty"),
    ],
)
def test_an_unusable_folder_is_reported(folder, message, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    code, _, err = _write(folder and tmp_path / folder, tmp_path)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert re.search(message, err), err


@pytest.mark.parametrize("force", ["force=false", "force=true"])
@pytest.mark.parametrize("file", ["thesis.tex", "work/thesis.tex", "work", FILE])
def test_other_files_are_never_changed_even_with_force(file, force, tmp_path):
    precious = tmp_path / "folder" / file
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    code, _, err = _write(tmp_path / "folder", tmp_path, force)
    assert code == 2
    assert "checkpoint.dir: " in err
    assert [path for path in (tmp_path / "folder").rglob("*") if path.is_file()] == [precious]


def test_force_removes_files_of_another_model(tmp_path):
    folder = tmp_path / "größe und maß"
    assert _write(folder, tmp_path, "model.layers=3").code == 0
    assert _write(folder, tmp_path, "model=tiny_opt", "force=true").code == 0
    shards = sorted(path.name for path in folder.glob("layer-*"))
    assert shards == ["layer-00000.safetensors", "layer-00001.safetensors"]
    files = {path.name for path in folder.iterdir()}
    manifest = json.loads((folder / FILE).read_text())
    assert files == {FILE, CARD, *manifest["files"], *(shard["file"] for shard in manifest["shards"])}


def test_a_resumed_progress_bar_starts_at_the_finished_layers(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    again = tmp_path / "again"
    monkeypatch.setattr(CheckpointWriter, "finish", interrupt)
    assert _write(again, tmp_path).code == 130
    monkeypatch.undo()
    began = []
    reset = Bars.reset
    monkeypatch.setattr(Bars, "reset", lambda self, task, **how: (began.append(how), reset(self, task, **how))[1])
    assert _write(again, tmp_path).code == 0
    assert began == [{"total": 2, "completed": 2, "description": "quantise"}]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["run"]["resumed_from_layer"] == 2
