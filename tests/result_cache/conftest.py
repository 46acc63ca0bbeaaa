"""A simulated full disk (tests/conftest.py has real ones, which need mounting)."""

from __future__ import annotations

import errno
import os

import pytest


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every flush fail as on a full disk, for machines that do not allow mounting."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
