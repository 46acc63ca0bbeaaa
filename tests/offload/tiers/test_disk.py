"""Test the expert file: reads return what was written, nothing stays in memory, and a different layout is refused."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from haq_lab.offload.tiers.arena import page_aligned
from haq_lab.offload.tiers.disk import ALIGNMENT, PAGE, ExpertFileWriter, ReadError, bind, expert_tensors, layout


def layer_of(experts: int, width: int, seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Sequential(nn.Linear(width, 3), nn.Linear(3, width)) for _ in range(experts))


def mapped_bytes(path: Path) -> int:
    """Return how many bytes of a mapped file are in this process's memory."""
    maps = Path("/proc/self/smaps").read_text()
    sizes = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss:\s+(\d+) kB", maps)
    return 1024 * sum(map(int, sizes))


@given(shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=5))
def test_parts_are_aligned_and_apart(shapes):
    tensors = {f"{index}.weight": torch.randn(shape).to(torch.float16) for index, shape in enumerate(shapes)}
    parts, size = layout(tensors)
    assert size % PAGE == 0
    assert all(part.offset % ALIGNMENT == 0 for part in parts)
    blob = torch.zeros(size, dtype=torch.uint8)
    for part in parts:
        part.of(blob).copy_(tensors[part.name])
    assert all(torch.equal(part.of(blob), tensors[part.name]) for part in parts)


def without_direct_reads(monkeypatch) -> None:
    """Simulate a file system without direct reads."""

    def refusing(path, flags, *more, real=os.open):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("direct", [True, False])
def test_written_experts_are_read_or_used_in_place_and_leave_memory(tmp_path, monkeypatch, direct):
    if not direct:
        without_direct_reads(monkeypatch)
    layers = [layer_of(4, 700, seed) for seed in range(3)]
    kept = [[{name: t.clone() for name, t in expert_tensors(expert).items()} for expert in layer] for layer in layers]
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        for layer in layers:
            writer.add(layer)
        assert all(tensor.numel() == 0 for layer in layers for tensor in layer.parameters()), "gone from memory"
        expert_file = writer.open()
    layout = expert_file.layouts.distinct[0]
    blob = page_aligned(layout.size)
    for layer, expert in ((2, 3), (0, 0), (1, 2)):
        expert_file.read(layer, expert, blob)
        module = layers[layer][expert]
        for use in ("read", "in place"):
            if use == "read":
                bind(module, layout.parts, blob)
            else:
                assert expert_file.use_in_place(layer, expert, module) is module
            for name, tensor in expert_tensors(module).items():
                assert torch.equal(tensor, kept[layer][expert][name])
        assert mapped_bytes(expert_file.path) > 0
        expert_file.end_use([module])
        assert mapped_bytes(expert_file.path) == 0
        assert not any(tensor.numel() for tensor in expert_tensors(module).values())
    expert_file.close()


def test_experts_of_several_layouts_are_read_and_used_in_place(tmp_path):
    """The second layer has experts of two sizes, one of which is also the first layer's."""
    layers = [layer_of(2, 700), nn.ModuleList([layer_of(1, 700, 1)[0], layer_of(1, 1400, 2)[0]])]
    kept = [[{name: t.clone() for name, t in expert_tensors(expert).items()} for expert in layer] for layer in layers]
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        for layer in layers:
            writer.add(layer)
        expert_file = writer.open()
    assert expert_file.layouts.index.tolist() == [[0, 0], [0, 1]]
    assert expert_file.path.stat().st_size == expert_file.moved_bytes.sum()
    for layer, number in ((1, 1), (0, 1), (1, 0), (0, 0)):
        module, layout = layers[layer][number], expert_file.layouts.of(layer, number)
        blob = page_aligned(layout.size)
        expert_file.read(layer, number, blob)
        bind(module, layout.parts, blob)
        for _ in ("read", "in place"):
            assert all(torch.equal(t, kept[layer][number][name]) for name, t in expert_tensors(module).items())
            expert_file.use_in_place(layer, number, module)
        expert_file.end_use([module])
    expert_file.close()


def test_the_file_is_flushed_before_it_is_read(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor, real=os.fsync: flushed.append(os.fstat(descriptor).st_size))
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        writer.add(layer_of(2, 8))
        expert_file = writer.open()
    assert flushed == [expert_file.layouts.sizes.sum()], "all of it, once"
    expert_file.close()


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("short", [True, False])
def test_a_read_that_fails_is_tried_again(tmp_path, monkeypatch, failures, short):
    layer = layer_of(2, 8)
    kept = {name: tensor.clone() for name, tensor in expert_tensors(layer[1]).items()}
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        writer.add(layer)
        expert_file = writer.open()
    left = [failures]

    def failing(descriptor, buffers, offset, real=os.preadv):
        if left[0]:
            left[0] -= 1
            if short:
                return 0
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    parts, size = expert_file.layouts.of(0, 1)
    blob = page_aligned(size)
    expert_file.read(0, 1, blob)
    assert left == [0]
    assert all(torch.equal(part.of(blob), kept[part.name]) for part in parts)
    left[0] = 3
    with pytest.raises(ReadError, match="expert 1 of layer 0"):
        expert_file.read(0, 1, blob)
    expert_file.close()
