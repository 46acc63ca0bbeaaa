"""A GPU for each process: jobs that run at once don't share one unless they are told to.

A lock file for each GPU, by its UUID, says whose it is; whatever ends the process frees it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from haq_lab.utils.console import errors, say

_held: dict[str, FileLock] = {}  # this process's, until it ends


def lock_gpu(device: torch.device, wait: Callable[[float], None] = time.sleep) -> torch.device:
    """`device` where it names a GPU, else the first free one; waits while other processes have them all.

    A process keeps what it has claimed: the jobs of a sweep that share one go on with its GPU.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if not count:
        return device
    wanted = range(count) if device.index is None else [device.index]
    names = {index: str(torch.cuda.get_device_properties(index).uuid) for index in wanted if index < count}
    mine = [index for index, name in names.items() if name in _held]
    said = False
    while names and not mine:
        mine = next(([index] for index, name in names.items() if _lock(name)), [])
        if not mine and not said:
            say("backend=cuda: waiting for a GPU that another job has (backend.share=true shares it)", on=errors)
            said = True
        if not mine:
            wait(1.0)
    if not mine:
        return device  # there is no such GPU: the kernels say so
    torch.cuda.set_device(mine[0])
    return torch.device("cuda", mine[0])


def _lock(name: str) -> bool:
    lock = FileLock(Path(tempfile.gettempdir()) / f"haq_lab_gpu_{os.getuid()}_{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _held[name] = lock
    return True
