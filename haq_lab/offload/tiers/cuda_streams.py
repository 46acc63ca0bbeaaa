"""Order copies of experts and computing on a device that does both at the same time.

A GPU computes on one stream and copies on another. A `mark` is a point in a stream (a CUDA event). To wait for a mark
means that later work starts only after all work before the mark is done. The engine needs two kinds of marks. A copy
waits for earlier computing before it overwrites a slot. Computing waits for the end of a copy before it reads the slot.
The host waits for neither.

On a CPU each call returns when its work is done, so a mark is the time. This module makes all CUDA calls of the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from haq_lab.utils.errors import UserError

Mark = Any  # seconds on a CPU, an event on a GPU

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context


class Streams:
    """The streams of a CPU: work is done when its call returns.

    Attributes:
        device: Device that runs the experts.
        separate_memory: Whether the device's memory is separate from the host's, so that experts are copied to it.
    """

    device = torch.device("cpu")
    separate_memory = False

    def mark(self) -> Mark:
        """Return a mark at the current point of the calling thread's stream."""
        return time.perf_counter()

    def wait(self, mark: Mark) -> None:
        """Let later work of the calling thread's stream start after a mark. Returns at once."""

    @contextmanager
    def copying(self, after: Mark) -> Iterator[None]:
        """Run work of the block on the copy stream, after a mark."""
        yield

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the seconds between two marks of the compute stream. Waits for the second one."""
        return end - begin

    def drain(self) -> None:
        """Wait until all copies are done."""

    def pin(self, memory: Tensor) -> None:
        """Pin host memory, so that the device can copy from it asynchronously.

        Args:
            memory: CPU tensor.

        Raises:
            UserError: The system does not allow that much pinned memory.
        """

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`. No copy from the memory may be running."""


class CudaStreams(Streams):
    """The streams of a GPU: torch's current stream computes, and a second stream copies.

    torch creates the copy stream as non-blocking, so it does not wait for the default stream. Only the marks define the
    order. The engine drains the copies before it frees the arena, so `Tensor.record_stream` is not needed.
    """

    separate_memory = True

    def __init__(self, device: torch.device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._copies = torch.cuda.Stream(self.device)

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    @contextmanager
    def copying(self, after: Mark) -> Iterator[None]:
        with torch.cuda.stream(self._copies):  # affects the calling thread only
            self._copies.wait_event(after)
            yield

    def seconds(self, begin: Mark, end: Mark) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def drain(self) -> None:
        self._copies.synchronize()

    def pin(self, memory: Tensor) -> None:
        # torch's pinned allocator would round the size up to a power of two (pytorch issue 95823).
        with torch.cuda.device(self.device):
            failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
        if failed:
            self._clear_error()
            raise UserError(
                f"offload: {memory.nbytes:,} bytes of host memory for experts could not be page-locked (CUDA error "
                f"{failed}). Free memory, raise `ulimit -l`, or choose backend=cpu, which keeps the experts on disk."
            )

    def unpin(self, memory: Tensor) -> None:
        with torch.cuda.device(self.device):
            failed = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        if int(failed):
            self._clear_error()
        torch.cuda.check_error(failed)

    def _clear_error(self) -> None:
        """Clear the error of a failed call. CUDA keeps it until it is read, and torch reads it after each kernel.

        torch does not offer `cudaGetLastError`. So this launches a kernel, for which torch raises and clears the error.
        """
        with suppress(RuntimeError):
            torch.ones(1, device=self.device)


def make_streams(device: torch.device) -> Streams:
    """Return the streams of a device.

    Args:
        device: Device of the backend.
    """
    return CudaStreams(device) if device.type == "cuda" else Streams()
