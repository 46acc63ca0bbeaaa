"""Reserve a GPU for this process, so that concurrent jobs use different GPUs.

There is one lock file per GPU, named by its UUID. The operating system releases the lock when the process ends.
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

_locks: dict[str, FileLock] = {}  # the locks of this process, by the GPU's UUID


def lock_gpu(device: torch.device, wait: Callable[[float], None] = time.sleep) -> torch.device:
    """Lock a GPU for this process and make it torch's current device. Waits while other processes use it.

    A process keeps its lock until it ends, so jobs of a sweep in one process use the same GPU.

    Args:
        device: A GPU such as `cuda:1`, or `cuda` for the first free one. Other devices are returned unchanged.
        wait: Called with the seconds to wait between two attempts.

    Returns:
        The locked GPU with its index. `device` itself if it does not exist; the kernels then raise an error.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if not count:
        return device
    wanted = range(count) if device.index is None else [device.index]
    names = {index: str(torch.cuda.get_device_properties(index).uuid) for index in wanted if index < count}
    mine = [index for index, name in names.items() if name in _locks]
    announced = False
    while names and not mine:
        mine = next(([index] for index, name in names.items() if _lock(name)), [])
        if not mine and not announced:
            say("backend=cuda: waiting for a GPU that another job uses. Set backend.share=true to share it.", on=errors)
            announced = True
        if not mine:
            wait(1.0)
    if not mine:
        return device  # there is no such GPU; the kernels raise an error
    torch.cuda.set_device(mine[0])
    return torch.device("cuda", mine[0])


def _lock(name: str) -> bool:
    lock = FileLock(Path(tempfile.gettempdir()) / f"haq_lab_gpu_{os.getuid()}_{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _locks[name] = lock
    return True
