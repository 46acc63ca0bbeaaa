"""Test which runs count as finished, what a new run archives or removes, and what a failure leaves."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from children import in_child, killed

from haq_lab.tracking import run_folder
from haq_lab.tracking.run_folder import RUN_FILES, RunFolder, read_results
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


class Killed(BaseException):
    """Stands for the end of the process."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, work: Callable[[], None]) -> bool:
    """Run `work`, and stop it before its `step`-th change of the file system. Return whether it was stopped."""
    left = step

    def count(original):
        def change(*given, **named):
            nonlocal left
            left -= 1
            if left <= 0:  # a killed process cannot change anything after its end either
                raise Killed
            return original(*given, **named)

        return change

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync"):
            patch.setattr(os, name, count(getattr(os, name)))
        try:
            work()
        except Killed:
            return True
    return False


def finished_run(path: Path) -> tuple[RunFolder, dict[str, str]]:
    """Return a folder with all files of a finished run, and the content of each file."""
    folder = RunFolder(path, {"a": 1})
    folder.begin("a: 1\n")
    folder.finish({}, {}, {"m": 1.0})
    for name in set(RUN_FILES) - {"results.json", "config.yaml", "events.jsonl", "figures", "wandb"}:
        (path / name).write_text(f"the first {name}")
    for name in ("figures", "wandb"):
        (path / name).mkdir()
        (path / name / "file").write_text(f"the first {name}")
    return folder, contents(path)


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("again", [None, 1, 4])
def test_no_kill_while_archiving_loses_a_file(tmp_path, monkeypatch, again):
    """The run is killed before each change of the file system; the next one before its `again`-th change."""
    step, stopped = 0, True
    while stopped:
        step += 1
        folder, files = finished_run(tmp_path / str(step))
        stopped = interrupt(monkeypatch, step, lambda: folder.begin("a: 1\n"))  # noqa: B023
        if again is not None:
            interrupt(monkeypatch, again, lambda: folder.begin("a: 1\n"))  # noqa: B023
        folder.begin("a: 1\n")
        archives = [contents(path) for path in (folder.path / "previous").iterdir()]
        assert archives.count(files) == 1
        assert len(archives) == 1
        assert read_results(folder.path / "results.json") is None
    assert step > len(RUN_FILES)


@pytest.mark.parametrize("dies_at", [1, 7, 14])
def test_a_killed_process_loses_no_file_either(tmp_path, dies_at):
    folder, files = finished_run(tmp_path / "run")
    assert killed(in_child(lambda: folder.begin("a: 1\n"), dies_at))
    folder.begin("a: 1\n")
    (archive,) = (folder.path / "previous").iterdir()
    assert contents(archive) == files


def test_a_failure_of_the_archiving_itself_does_not_replace_an_archived_error(tmp_path, monkeypatch):
    folder, files = finished_run(tmp_path)
    assert interrupt(monkeypatch, len(RUN_FILES) + 5, lambda: folder.begin("a: 1\n"))  # all files are moved
    folder.fail({}, OSError("the disk is gone"), mistake=False)
    folder.begin("a: 1\n")
    (archive,) = (tmp_path / "previous").iterdir()
    assert contents(archive) == files
    assert not (tmp_path / "error.json").exists()


def test_a_folder_in_use_is_refused_and_its_holder_named(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1})
    ready, begun = os.pipe()
    wait, end = os.pipe()

    def hold() -> None:
        with folder.locked():
            os.write(begun, b"x")
            os.read(wait, 1)

    child = in_child(hold)
    os.read(ready, 1)
    message = rf"'.*run' is in use by process {child} on \S+ since .*\. Wait until it ends, or choose another folder\."
    with pytest.raises(UserError, match=message), folder.locked():
        pass
    assert not (folder.path / "error.json").exists()
    os.write(end, b"x")
    assert not killed(child)
    with folder.locked():
        assert f"process {os.getpid()} on" in (folder.path / ".lock.holder").read_text()
    assert not (folder.path / ".lock.holder").exists()


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    folder = RunFolder(tmp_path, {"a": 1})

    def die() -> None:
        with folder.locked():
            os.kill(os.getpid(), 9)

    assert killed(child := in_child(die))
    assert f"process {child} " in (tmp_path / ".lock.holder").read_text()
    with folder.locked():
        assert f"process {os.getpid()} " in (tmp_path / ".lock.holder").read_text()


@pytest.mark.parametrize("name", ["figures", "wandb", "config.yaml"])
def test_files_that_no_run_wrote_are_not_removed(tmp_path, name):
    """As in `hydra.run.dir=.`, where the user works; and not at the second try either."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("mine")
    folder = RunFolder(tmp_path, {"a": 1})
    for _ in range(2):
        with pytest.raises(UserError, match=f"contains '{name}', which no run wrote. Choose another folder."):
            folder.begin("a: 1\n")
        folder.fail({}, ValueError("a mistake"), mistake=True)
    assert (tmp_path / name / "precious").read_text() == "mine"
    (tmp_path / name).rename(tmp_path / "elsewhere")
    folder.begin("a: 1\n")
    assert not (tmp_path / "error.json").exists()


def test_a_new_run_removes_the_temporary_files_of_a_killed_one(tmp_path):
    folder = RunFolder(tmp_path, {"a": 1})
    (tmp_path / ".results.json.999999999.part").write_text("half")
    folder.begin("a: 1\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "events.jsonl"]


def test_a_failure_is_recorded_unless_the_disk_is_full(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, {"a": 1})
    folder.fail({"model": "m"}, KeyboardInterrupt(), mistake=False)
    assert json.loads((tmp_path / "error.json").read_text())["error"]["message"] == "KeyboardInterrupt"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    folder.fail({}, ValueError("the error itself"), mistake=False)  # raises nothing of its own


def test_metrics_that_are_not_finite_are_null_with_a_reason(tmp_path):
    metrics = {"perplexity.x": float("nan"), "perplexity_fp.x": float("inf"), "kl.x": 0.5}
    written = RunFolder(tmp_path, {}).finish({}, {}, metrics)
    text = (tmp_path / "results.json").read_text()
    assert not re.search(r"NaN|Infinity", text)
    assert json.loads(text) == written == read_results(tmp_path / "results.json")
    assert written["metrics"] == {"perplexity.x": None, "perplexity_fp.x": None, "kl.x": 0.5}
    assert written["not_finite"] == {
        "perplexity.x": "not a number, because activations or logits overflowed",
        "perplexity_fp.x": "larger than a 64-bit float can represent",
    }
