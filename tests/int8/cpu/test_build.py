"""Test that the native library is compiled once, and again if the cached file is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from children import in_child, killed

from haq_lab.int8.cpu import build as native_build

BUILT = bytes(range(256)) * 64


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[Path]:
    """An empty cache, and a compiler that only writes `BUILT`. Return the files that it wrote."""
    outputs: list[Path] = []

    def compile_nothing(command: list[str]) -> None:
        outputs.append(Path(command[-1]))
        outputs[-1].write_bytes(BUILT)

    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(native_build, "_compile", compile_nothing)
    return outputs


def test_a_failed_build_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(native_build, "FLAGS", ("-no-such-flag",))
    with pytest.raises(native_build.BuildError, match="failed on the CPU kernels"):
        native_build.build()
    assert not [path for path in (tmp_path / "native").iterdir() if path.suffix != ".lock"]


def test_the_library_is_built_once(compiled, monkeypatch):
    first = native_build.build()
    assert first.read_bytes() == BUILT
    assert native_build.build() == first
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert native_build.build() == first, "without a compiler, the cached library is used"
    assert len(compiled) == 1


DAMAGE = {
    "empty": b"",
    "truncated": BUILT[: len(BUILT) // 2],
    "one bit flipped": BUILT[:1000] + bytes([BUILT[1000] ^ 1]) + BUILT[1001:],
    "too long": BUILT + b"x",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_library_is_built_again(compiled, monkeypatch, content):
    library = native_build.build()
    library.write_bytes(content)
    assert native_build.build().read_bytes() == BUILT
    assert len(compiled) == 2
    library.write_bytes(content)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native_build.BuildError, match="no C\\+\\+ compiler"):
        native_build.build()
    assert not library.exists()


@pytest.mark.slow
def test_a_truncated_real_library_does_not_kill_the_process(monkeypatch, tmp_path):
    """Loading it raises SIGBUS, so the real library is only checked, in a process of its own."""
    from haq_lab.int8.cpu import library

    real = native_build.build()
    if library.unavailable_reason():
        pytest.skip(library.unavailable_reason())
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path))
    cached = tmp_path / "native" / real.name
    cached.parent.mkdir()
    cached.write_bytes(real.read_bytes()[:5000])

    def copy(command: list[str]) -> None:
        Path(command[-1]).write_bytes(real.read_bytes())

    monkeypatch.setattr(native_build, "_compile", copy)

    def load() -> None:
        lib, reason = library._load.__wrapped__()
        assert lib is not None, reason

    assert not killed(in_child(load))
    assert cached.read_bytes() == real.read_bytes()


def test_the_build_folder_of_a_killed_process_is_removed(compiled, monkeypatch, tmp_path):
    def kill(command: list[str]) -> None:
        Path(command[-1]).write_bytes(b"half")
        os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr(native_build, "_compile", kill)
        assert killed(in_child(native_build.build))
    assert list((tmp_path / "native").glob(".*.part"))
    native_build.build()
    assert not list((tmp_path / "native").glob(".*.part"))
