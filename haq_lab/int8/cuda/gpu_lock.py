"""Reserve GPUs for this process, so that concurrent jobs use different GPUs.

There is one lock file per GPU, named by its UUID. The operating system releases the lock if the process dies.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import torch

from haq_lab.utils.console import errors, say
from haq_lab.utils.errors import UserError
from haq_lab.utils.exclusive_lock import LockedError, exclusive_lock

INTERVAL = 1.0  # seconds between two attempts

_held: dict[str, tuple[ExitStack, int]] = {}  # this process's locks and their number of users, by the GPU's UUID


class GpuLock:
    """A GPU that other processes do not use until `release`. Several locks of one process can share a GPU.

    Args:
        device: A GPU such as `cuda:1`, or `cuda` for the first free one. It becomes torch's current device.
        timeout: Seconds to wait while other processes use the GPU. None waits without a limit.
        wait: Called with the seconds to wait between two attempts.

    Attributes:
        device: The locked GPU with its index. `device` itself if there is no such GPU; the kernels then raise an error.

    Raises:
        UserError: The GPU is still in use after `timeout` seconds. The message names the process that uses it.
    """

    def __init__(self, device: torch.device, timeout: float | None = None, wait: Callable[[float], None] = time.sleep):
        self.device, self._name = device, ""
        count = torch.cuda.device_count() if device.type == "cuda" else 0
        indices = range(count) if device.index is None else [device.index]
        names = {str(torch.cuda.get_device_properties(index).uuid): index for index in indices if index < count}
        if names:
            self._name = _lock_one_of(names, timeout, wait)
            self.device = torch.device("cuda", names[self._name])
            torch.cuda.set_device(self.device)

    def release(self) -> None:
        """Let other processes use the GPU. A second call does nothing."""
        if self._name:
            stack, users = _held.pop(self._name)
            if users > 1:
                _held[self._name] = stack, users - 1
            else:
                stack.close()
        self._name = ""


def _lock_one_of(names: Iterable[str], timeout: float | None, wait: Callable[[float], None]) -> str:
    """Lock a GPU that this process has locked already, or the first free one. Returns its UUID."""
    waited = 0.0
    while True:
        holders = []
        for name in sorted(names, key=lambda name: name not in _held):  # the process's own first
            try:
                stack, users = _held.get(name) or (_acquire(name), 0)
            except LockedError as error:
                holders.append(str(error))
            else:
                _held[name] = stack, users + 1
                return name
        used = f"every GPU that backend.device allows is in use by another job ({', '.join(holders)})"
        if timeout is not None and waited >= timeout:
            raise UserError(
                f"backend.lock_timeout: after {timeout:g} seconds {used}. "
                "Wait until it ends, or set backend.share=true to share the GPU."
            )
        if not waited:
            say(f"backend=cuda: {used}. Waiting. Set backend.share=true to share the GPU.", on=errors)
        wait(INTERVAL)
        waited += INTERVAL


def _acquire(name: str) -> ExitStack:
    """Acquire the lock file of a GPU. Raises LockedError if another process has it."""
    stack = ExitStack()
    stack.enter_context(exclusive_lock(Path(tempfile.gettempdir()) / f"haq_lab_gpu_{os.getuid()}_{name}.lock"))
    return stack
