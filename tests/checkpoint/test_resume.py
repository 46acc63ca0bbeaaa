"""A killed run resumes after its last finished layer and writes the same checkpoint as an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from children import in_child, killed
from launching import TINY, launch
from safetensors.torch import load_file

MODEL = ["model=tiny_mixtral", "model.layers=3", "quantizer=haq", "quantizer.asymmetric_calibration=true"]


def _arguments(folder: Path) -> list[str]:
    return [*TINY, *MODEL, f"checkpoint.dir={folder / 'checkpoint'}", f"hydra.run.dir={folder / 'run'}"]


def _killed(folder: Path, at: int) -> bool:
    """Run in a process that is killed at its `at`-th rename or flush. Return False if it ended before."""

    def run() -> None:
        outcome = launch(*_arguments(folder))
        os.write(2, outcome.err.encode())
        assert outcome.code == 0

    return killed(in_child(run, dies_at=at))


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _results(folder: Path) -> dict:
    return json.loads((folder / "run" / "results.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    outcome = launch(*_arguments(folder))
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_repeated_kills_do_not_change_the_checkpoint(uninterrupted, tmp_path, seed):
    draw = random.Random(seed)
    deaths = 0
    while _killed(tmp_path, at=draw.randint(3, 60)):
        deaths += 1
        assert not (tmp_path / "run" / "results.json").exists()
        assert deaths < 40
    assert deaths >= 1
    assert _content(tmp_path / "checkpoint") == _content(uninterrupted / "checkpoint")
    ours, theirs = _results(tmp_path), _results(uninterrupted)
    same = [name for name in theirs["metrics"] if not name.startswith(("time.", "memory.peak"))]
    assert {name: ours["metrics"][name] for name in same} == {name: theirs["metrics"][name] for name in same}
    routing = [load_file(folder / "run" / "routing.safetensors") for folder in (tmp_path, uninterrupted)]
    assert all(torch.equal(routing[0][name], routing[1][name]) for name in routing[1])
    for table in ("layers.csv", "experts.csv"):
        assert (tmp_path / "run" / table).read_bytes() == (uninterrupted / "run" / table).read_bytes()


@pytest.mark.slow
def test_finished_layers_are_not_repeated(uninterrupted, tmp_path):
    """After a kill during the rename of the third state, the next run starts with the third layer."""
    at = 1
    while not (tmp_path / "checkpoint" / "work" / "state-00001").is_dir():
        at += 8
        assert _killed(tmp_path, at)
    outcome = launch(*_arguments(tmp_path))
    assert outcome.code == 0, outcome.err
    assert _results(tmp_path)["run"]["resumed_from_layer"] >= 2


def test_other_settings_cannot_resume_a_run(tmp_path):
    assert _killed(tmp_path, 30)
    outcome = launch(*_arguments(tmp_path), "quantizer.dampening_frac=0.02")
    assert outcome.code == 2
    assert "provenance.settings.quantizer.dampening_frac" in outcome.err
    outcome = launch(*_arguments(tmp_path), "quantizer.dampening_frac=0.02", "force=true")
    assert outcome.code == 0, outcome.err


def test_a_folder_with_content_is_refused(uninterrupted, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "thesis.tex").write_text("precious")
    outcome = launch(*_arguments(tmp_path))
    assert outcome.code == 2
    assert "is not empty" in outcome.err
    outcome = launch(*_arguments(uninterrupted), f"hydra.run.dir={tmp_path / 'other'}")
    assert outcome.code == 2
    assert "contains a finished checkpoint" in outcome.err
