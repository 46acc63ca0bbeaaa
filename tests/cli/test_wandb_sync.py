"""`python -m haq_lab.tracking sync`: upload each pending run once, with W&B's own command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from haq_lab.cli import wandb_sync as command


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two offline runs below a folder with a blank in its name, one uploaded before, and an archived one."""
    for name in ("a run/previous/20260101-000000", "a run", "another"):
        folder = tmp_path / name / "wandb" / f"offline-run-20260101_000000-{name[:1]}{len(name)}"
        folder.mkdir(parents=True)
        (folder / "run-x.wandb").write_bytes(b"log")
    (folder / "run-x.wandb.synced").touch()
    return tmp_path


def _wandb(monkeypatch, *, works: bool) -> list[Path]:
    """Replace W&B's command. Return the list of the runs that it uploads."""
    uploaded: list[Path] = []

    def run(arguments, **settings):
        assert arguments[1:4] == ["-m", "wandb", "sync"]
        assert "WANDB_RUN_ID" not in settings["env"]  # each log has the id of its run
        uploaded.append(Path(arguments[4]))
        if works:
            (uploaded[-1] / "run-x.wandb.synced").touch()
        return subprocess.CompletedProcess(arguments, 0 if works else 1, "", "" if works else "wandb: ERROR no network")

    monkeypatch.setattr(subprocess, "run", run)
    return uploaded


def test_what_waits_is_uploaded_once(runs, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    uploaded = _wandb(monkeypatch, works=True)
    command.main(["sync", str(runs), str(runs / "a run")])
    command.main(["sync", str(runs)])
    assert [path.parts[-3] for path in uploaded] == ["a run"]
    printed = capsys.readouterr().out
    assert "1 of 1 runs uploaded" in printed
    assert "0 of 0 runs uploaded" in printed


def test_what_fails_waits_on_and_says_why(runs, monkeypatch, capsys):
    _wandb(monkeypatch, works=False)
    with pytest.raises(SystemExit, match="2"):
        command.main(["sync", str(runs)])
    messages = capsys.readouterr().err
    assert "no network" in messages
    assert "run the same command again" in messages
    assert len(command.pending_runs(runs)) == 1


def test_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["sync", str(tmp_path / "nowhere")])
    assert "there is no folder" in capsys.readouterr().err
