"""Measure this machine for the hardware profile `local`, which `python -m haq_lab.offload profile` saves."""

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

SIZE = 64 * 2**20  # bytes to copy and read, more than the CPU caches hold
ROWS, K = 512, 2048  # sizes of the int8 matrix product


def measure_machine(scratch: Path) -> Hardware:
    """Measure this machine. The CPU is the device, and the disk is the slow tier.

    Args:
        scratch: Folder on the disk that would hold the slow tier.

    Returns:
        The measured hardware profile.
    """
    backend = CpuBackend()
    rows, columns = (torch.randint(-127, 128, (size, K), dtype=torch.int8) for size in (ROWS, K))
    weights, row_scale = PackedLinear(backend.pack(columns), torch.ones(K)), torch.ones(ROWS, 1)
    multiply = _shortest_seconds(lambda: backend.product(rows, row_scale, weights, torch.float32))
    source, target = torch.ones(SIZE, dtype=torch.uint8), page_aligned(SIZE)
    copy = _shortest_seconds(lambda: target.copy_(source))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        read = _shortest_seconds(_reader(Path(folder) / "bytes", target))
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


def _shortest_seconds(run: Callable[[], Any]) -> float:
    """Return the shortest time of five runs, in seconds."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
