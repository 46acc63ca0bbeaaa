"""Hardware by name, this machine included: `local` is what `python -m haq_lab.offload profile` measured here."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import yaml

from haq_lab.errors import UserError
from haq_lab.files import write_text
from haq_lab.int8.cpu import CpuBackend
from haq_lab.int8.roofline import Hardware, load_hardware
from haq_lab.paths import cache_folder

SIZE = 64 * 2**20  # bytes copied and read: more than any cache near the cores


def local_path() -> Path:
    """Where this machine's profile is kept."""
    return cache_folder() / "hardware" / "local.yaml"


def hardware(name: str) -> Hardware:
    """A profile by name. Raises `UserError` for an unknown one, or for `local` before it was measured."""
    if name != "local":
        return load_hardware(name)
    if not local_path().is_file():
        raise UserError("hardware: 'local' has not been measured yet; run: python -m haq_lab.offload profile")
    return Hardware(**yaml.safe_load(local_path().read_text(encoding="utf-8")))


def measure_machine(scratch: Path) -> Hardware:
    """This machine as a profile: the CPU is the device, the disk is behind the link.

    Args:
        scratch: A folder on the disk that would hold the slow tier.
    """
    rows, columns = torch.randint(-127, 128, (512, 2048), dtype=torch.int8), torch.randint(-127, 128, (2048, 2048))
    backend = CpuBackend()
    pack = getattr(backend, "pack", lambda levels: levels)
    weight = pack(columns.to(torch.int8))
    multiply = _least(lambda: backend.accumulate(rows, weight))
    source, target = torch.ones(SIZE, dtype=torch.uint8), torch.empty(SIZE, dtype=torch.uint8)
    copy = _least(lambda: target.copy_(source))
    read = _least(_reader(scratch / ".haq_lab_profile", target))
    (scratch / ".haq_lab_profile").unlink()
    stamp = time.strftime("%Y-%m-%d")
    return Hardware(
        name=f"this machine ({platform.machine()}, {os.cpu_count()} cores)",
        int8_tops=2 * 512 * 2048 * 2048 / multiply / 1e12,
        bandwidth_gbs=2 * SIZE / copy / 1e9,
        memory_gb=psutil.virtual_memory().total / 1e9,
        link_gbs=SIZE / read / 1e9,
        host_gbs=2 * SIZE / copy / 1e9,
        source=f"measured here on {stamp}: int8 product, copy in memory, uncached read from the disk as link",
    )


def save_local(profile: Hardware) -> Path:
    """Keep it as `local`."""
    write_text(local_path(), yaml.safe_dump(asdict(profile), sort_keys=False))
    return local_path()


def _reader(path: Path, target: torch.Tensor) -> Callable[[], Any]:
    path.write_bytes(bytes(SIZE))
    view = memoryview(cast(Any, target.numpy()))

    def read() -> None:
        with path.open("rb", buffering=0) as stream:
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
