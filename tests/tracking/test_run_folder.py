"""A run's folder: what counts as finished, what is archived, what a failure leaves."""

from __future__ import annotations

import json

import pytest

from haq_lab.tracking import run_folder
from haq_lab.tracking.run_folder import RunFolder
from haq_lab.utils.errors import UserError


def test_only_whole_results_of_the_same_config_count(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1, "force": False, "tracking": "offline"})
    assert folder.finished() is None
    folder.begin("a: 1\n")
    assert folder.finished() is None
    folder.finish({}, {}, {"m": 1.0})
    assert RunFolder(folder.path, {"a": 1, "force": True, "tracking": None}).finished()["metrics"] == {"m": 1.0}
    assert RunFolder(folder.path, {"a": 2}).finished() is None
    (folder.path / "results.json").write_text('{"schema": 1, "config": {"a"')
    assert folder.finished() is None


def test_results_are_archived_and_leftovers_are_not(tmp_path):
    folder = RunFolder(tmp_path, {"a": 1})
    for _ in range(3):
        folder.begin("a: 1\n")
        folder.event("loaded")
        folder.finish({}, {}, {})
    folder.begin("a: 1\n")
    assert len(list((tmp_path / "previous").iterdir())) == 3
    folder.event("killed soon")
    folder.begin("a: 1\n")
    assert len(list((tmp_path / "previous").iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "events.jsonl", "previous"]


@pytest.mark.parametrize("name", ["figures", "wandb", "config.yaml"])
def test_what_no_run_left_is_not_removed(tmp_path, name):
    """As in `hydra.run.dir=.`, where the user works; and not at the second try either."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("mine")
    folder = RunFolder(tmp_path, {"a": 1})
    for _ in range(2):
        with pytest.raises(UserError, match=f"holds '{name}', which no run left; choose another folder"):
            folder.begin("a: 1\n")
        folder.fail({}, ValueError("a mistake"), mistake=True)
    assert (tmp_path / name / "precious").read_text() == "mine"
    (tmp_path / name).rename(tmp_path / "elsewhere")
    folder.begin("a: 1\n")
    assert not (tmp_path / "error.json").exists()


def test_a_failure_is_recorded_unless_the_disk_is_full(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, {"a": 1})
    folder.fail({"model": "m"}, KeyboardInterrupt(), mistake=False)
    assert json.loads((tmp_path / "error.json").read_text())["error"]["message"] == "KeyboardInterrupt"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    folder.fail({}, ValueError("the error itself"), mistake=False)  # raises nothing of its own


def test_nan_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        RunFolder(tmp_path, {}).finish({}, {}, {"perplexity.x": float("nan")})
    assert not (tmp_path / "results.json").exists()
