"""Test that files and folders are complete or absent, and that folder names are unique and short enough."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
from children import in_child, killed
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.utils.atomic_files import (
    atomic_file,
    atomic_folder,
    remove_leftovers,
    sha256,
    write_json,
    write_text,
)
from haq_lab.utils.paths import folder_name


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as aside:  # noqa: PT012
        aside.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["file.json"]  # noqa: PTH208


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_failed_folder_is_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "made") as aside:  # noqa: PT012
        (aside / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "made") as aside:
        (aside / "whole").write_text("x")
    assert (tmp_path / "made" / "whole").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_sha256(tmp_path):
    write_text(tmp_path / "a", "abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_plain_overrides_are_the_folder_name():
    assert folder_name("model=smol,quantizer=haq") == "model=smol,quantizer=haq"
    assert folder_name("") == "default"


@given(st.text(), st.text())
def test_folder_names_fit_and_differ(first, second):
    for text in (first, second, first * 40):
        name = folder_name(text)
        assert 0 < len(name.encode(errors="surrogateescape")) < 255
        assert not set(name) & set("/\\\0\n ")
    if first != second and "default" not in (first, second):
        assert folder_name(first) != folder_name(second)


@pytest.fixture
def steps(monkeypatch) -> list[tuple[str, str]]:
    """What is flushed to the disk and what is renamed, in order, by name."""
    seen: list[tuple[str, str]] = []
    flush, replace = os.fsync, Path.replace

    def fsync(descriptor):
        seen.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        flush(descriptor)

    def renamed(path, target):
        seen.append(("rename", path.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    return seen


def test_a_file_is_flushed_before_it_is_renamed(steps, tmp_path):
    write_text(tmp_path / "a.txt", "x")
    aside = f".a.txt.{os.getpid()}.part"
    assert steps == [("flush", aside), ("rename", aside)]


def test_every_file_of_a_folder_is_flushed_before_it_is_renamed(steps, tmp_path):
    with atomic_folder(tmp_path / "made") as aside:
        (aside / "deep").mkdir()
        for name in ("one", "deep/two"):
            (aside / name).write_text(name)
    assert sorted(steps[:-1]) == [("flush", "one"), ("flush", "two")]
    assert steps[-1] == ("rename", f".made.{os.getpid()}.part")


def write_and_stop(writer, target: Path) -> tuple[int, int]:
    """Start a process that writes `target` and waits before it finishes. Return its id, and a pipe that lets it end."""
    ready, begun = os.pipe()
    wait, end = os.pipe()

    def work() -> None:
        with writer(target) as aside:
            (aside / "file" if aside.is_dir() else aside).write_text("x")
            os.write(begun, b"x")
            os.read(wait, 1)

    child = in_child(work)
    os.read(ready, 1)
    return child, end


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_the_temporary_path_of_a_killed_process_is_removed(tmp_path, writer):
    child, _ = write_and_stop(writer, tmp_path / "made")
    (partial,) = tmp_path.iterdir()
    os.kill(child, 9)
    assert killed(child)
    (tmp_path / "other").write_text("x")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert partial.name == f".made.{child}.part"


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
@pytest.mark.parametrize("visible", [True, False], ids=["same machine", "other machine or container"])
def test_the_temporary_path_of_a_living_process_stays(tmp_path, monkeypatch, writer, visible):
    child, end = write_and_stop(writer, tmp_path / "made")
    if not visible:
        monkeypatch.setattr(psutil, "Process", unknown_process)
    remove_leftovers(tmp_path)
    os.write(end, b"x")
    assert not killed(child)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def unknown_process(number: int) -> psutil.Process:
    raise psutil.NoSuchProcess(number)


def test_a_process_that_reuses_the_id_does_not_keep_a_leftover(tmp_path, monkeypatch):
    """As in containers, where many processes have the id 1."""
    leftover = tmp_path / f".made.{os.getpid()}.part"
    leftover.write_text("x")
    remove_leftovers(tmp_path)
    assert leftover.exists()
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: leftover.stat().st_ctime + 60)
    remove_leftovers(tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("name", [".made.part", "made.1.part", ".made.12x.part", ".made.999999999.part.txt", ".1.part"])
def test_files_with_other_names_are_not_leftovers(tmp_path, name):
    (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "made") as aside:
            (aside / content).write_text(content)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
