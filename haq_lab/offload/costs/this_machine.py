"""Hardware by name, this machine included: `local` is what `python -m haq_lab.offload profile` measured here."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from haq_lab.hardware.spec import Hardware
from haq_lab.int8.backend import PackedLinear
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.offload.tiers.arena import page_aligned
from haq_lab.offload.tiers.disk import open_direct

SIZE = 64 * 2**20  # bytes copied and read: more than any cache near the cores


ROWS, K = 512, 2048  # of the int8 product


def measure_machine(scratch: Path) -> Hardware:
    """This machine as a profile: the CPU is the device, the disk is behind the link.

    Args:
        scratch: A folder on the disk that would hold the slow tier.
    """
    backend = CpuBackend()
    rows, columns = (torch.randint(-127, 128, (size, K), dtype=torch.int8) for size in (ROWS, K))
    weights, row_scale = PackedLinear(backend.pack(columns), torch.ones(K)), torch.ones(ROWS, 1)
    multiply = _least(lambda: backend.product(rows, row_scale, weights, torch.float32))
    source, target = torch.ones(SIZE, dtype=torch.uint8), page_aligned(SIZE)
    copy = _least(lambda: target.copy_(source))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        read = _least(_reader(Path(folder) / "bytes", target))
    stamp = time.strftime("%Y-%m-%d")
    return Hardware(
        name=f"this machine ({platform.machine()}, {os.cpu_count()} cores)",
        int8_tops=2 * ROWS * K * K / multiply / 1e12,
        bandwidth_gbs=2 * SIZE / copy / 1e9,
        memory_gb=psutil.virtual_memory().total / 1e9,
        link_gbs=SIZE / read / 1e9,
        host_gbs=2 * SIZE / copy / 1e9,
        source=f"measured here on {stamp}: int8 product, copy in memory, uncached read from the disk as link",
        from_disk=True,
    )


def _reader(path: Path, target: torch.Tensor) -> Callable[[], Any]:
    path.write_bytes(bytes(SIZE))
    view = memoryview(cast(Any, target.numpy()))

    def read() -> None:
        with open(path, "rb", buffering=0, opener=lambda name, _: open_direct(name)) as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            stream.readinto(view)

    return read


def _least(run: Callable[[], Any]) -> float:
    """The shortest of a few runs, in seconds."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
