"""Test the memory that is allocated in huge pages."""

import mmap

import pytest
import torch

from haq_lab.hardware import huge_pages as module
from haq_lab.hardware.huge_pages import huge_pages, prefer_huge_pages


@pytest.mark.parametrize("count", [0, 1, 4096, (4 << 20) + 5])
def test_all_bytes_can_be_used(count):
    data = huge_pages(count)
    assert data.shape == (count,)
    assert data.fill_(7).sum() == 7 * count


def test_the_advice_keeps_the_values():
    data = torch.arange(1 << 20, dtype=torch.int32)
    prefer_huge_pages(data)
    assert torch.equal(data, torch.arange(1 << 20, dtype=torch.int32))


def test_only_whole_pages_inside_the_tensor_are_advised(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_madvise", lambda: lambda *arguments: calls.append(arguments[:2]))
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    data = torch.empty(10 * mmap.PAGESIZE, dtype=torch.uint8)[1:]
    prefer_huge_pages(data)
    ((start, count),) = calls
    assert start % mmap.PAGESIZE == count % mmap.PAGESIZE == 0
    assert data.data_ptr() <= start < data.data_ptr() + mmap.PAGESIZE
    assert data.data_ptr() + data.nbytes - mmap.PAGESIZE < start + count <= data.data_ptr() + data.nbytes
