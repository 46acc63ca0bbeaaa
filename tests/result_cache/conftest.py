"""A disk that is full, where mounting is not allowed (tests/conftest.py has real ones)."""

from __future__ import annotations

import errno
import os

import pytest


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flush fails as on a full disk: for where mounting is not allowed."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
