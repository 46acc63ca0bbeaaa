"""Test that hidden states beyond the limit are in unnamed files that leave nothing behind."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.errors import UserError


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_both_kinds_hold_what_is_written(tmp_path):
    buffer = HiddenStateBuffer(limit=5000, folder=tmp_path)
    kept, mapped = buffer.empty((2, 3, 100), torch.float32), buffer.empty((2, 3, 200), torch.float32)
    for tensor in (kept, mapped):
        values = torch.randn(tensor.shape)
        for batch, part in zip(tensor.split(1), values.split(1), strict=True):
            batch.copy_(part)
        buffer.release()
        assert torch.equal(tensor, values)
        assert torch.equal(buffer.copy(tensor), values)
    assert not list(tmp_path.iterdir()), "files without a name: nothing is left behind, however the run ends"
    del buffer
    gc.collect()
    assert mapped.isfinite().all(), "a tensor keeps its file alive"


def test_released_pages_leave_memory(tmp_path):
    buffer = HiddenStateBuffer(limit=0, folder=tmp_path)
    tensor = buffer.empty((64, 1 << 18), torch.float32)  # 64 MiB
    before = resident()
    tensor.fill_(3)
    assert resident() - before > 50 << 20
    buffer.release()
    assert resident() - before < 10 << 20
    assert (tensor[::7, ::1000] == 3).all()


def test_a_full_disk_raises(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for 4\.0 GB of hidden states"):
        HiddenStateBuffer(limit=0, folder=tmp_path).empty((10**9,), torch.float32)


def test_an_empty_tensor():
    assert HiddenStateBuffer(limit=0).empty((0, 3), torch.float32).shape == (0, 3)
