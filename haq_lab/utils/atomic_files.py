"""Write files and folders atomically: to a temporary path that is flushed to disk and then renamed.

A temporary path is `.NAME.PID.part` beside its target. It is locked until it is complete. So `remove_leftovers` can
tell the paths that killed processes left from those that are still being written.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

CLOCK_ERROR = 2.0  # seconds by which a process's start time may differ from the clock of the file system


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it replaces `path`; on failure it is removed.

    Args:
        path: The file to write. Its folder is created if necessary.

    Example:
        >>> with atomic_file(path) as temporary:  # doctest: +SKIP
        ...     temporary.write_text("complete or absent")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    try:
        with naming_path(path), temporary.open("wb") as stream:
            _mark_in_use(stream.fileno())
            yield temporary
            _flush(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Make sure that disk errors within the block name the path.

    A failed write does not report the file. safetensors raises an error type of its own, which becomes an OSError here.

    Args:
        path: File or folder that the block writes.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, and remove it afterwards.

    Args:
        path: Names the temporary folder. It need not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = _temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _mark_in_use(descriptor)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder. On success it replaces `folder`; on failure it is removed.

    Args:
        folder: The folder to write.
    """
    with temporary_folder(folder) as temporary, naming_path(folder):
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _flush(path)
        replaced = _temporary_path(folder.with_name(f"{folder.name}.replaced"))
        if folder.exists():
            folder.replace(replaced)
        temporary.replace(folder)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of killed processes from `folder`. Its subfolders are not searched."""
    for path in folder.glob(".*.part"):
        if is_leftover(path):
            with suppress(OSError):  # read-only, or another process removes it too
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_leftover(path: Path) -> bool:
    """Return whether `path` is a temporary file or folder whose process was killed.

    Its lock decides, because process ids mean nothing to other machines and containers that share a folder. A file
    system may not support locks, so the process must be dead too.
    """
    match = re.fullmatch(r"\..+\.(\d+)\.part", path.name, re.DOTALL)
    try:
        return match is not None and not _may_be_writing(int(match[1]), path) and not _is_in_use(path)
    except OSError:
        return False


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _mark_in_use(descriptor: int) -> None:
    """Lock a temporary path until its descriptor is closed."""
    with suppress(OSError):  # not all file systems support locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def _is_in_use(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _may_be_writing(process: int, path: Path) -> bool:
    """Return whether a process exists and is older than the last change of `path`. If not, its id was reused."""
    try:
        return psutil.Process(process).create_time() <= path.stat().st_ctime + CLOCK_ERROR
    except (psutil.Error, OverflowError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON to `path` atomically. Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, and read the file again only if its size or modification time has changed."""
    stat = path.stat()
    return _sha256_of(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256_of(path: Path, *_: int) -> str:
    return sha256(path)
