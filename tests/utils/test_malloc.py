"""Test that freed memory is returned to the system."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from haq_lab.utils import malloc as heap


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no malloc_trim in this C library")
def test_gaps_between_tensors_are_returned():
    process = psutil.Process()
    torch.ones(8 << 20, dtype=torch.uint8)  # from here on blocks of this size lie in the heap
    blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(128)]
    kept = blocks[::16]
    del blocks
    heap.release_memory()
    before = process.memory_info().rss
    fresh = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(120)]
    filled = process.memory_info().rss
    assert filled - before > 100 << 20, "the holes had been returned"
    del fresh
    heap.release_memory()
    assert process.memory_info().rss < before + (16 << 20)
    assert all(block.all() for block in kept)


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    heap._trim.cache_clear()
    try:
        heap.release_memory()
    finally:
        heap._trim.cache_clear()
