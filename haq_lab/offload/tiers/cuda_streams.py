"""The order between copying experts and computing with them, on a device that does both at once.

Computing goes on on one stream of the device, copies on another. A `mark` is a moment of a stream: whoever waits for
it goes on only when all that was asked of that stream before is done. The engine marks two kinds: what has been
computed so far, for which a copy waits before it overwrites a slot, and the end of a copy, for which computing waits
before it reads the slot. The host itself waits for neither.

On a CPU both are done when the call returns, and a mark is the time. The CUDA calls are all here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from haq_lab.utils.errors import UserError

Mark = Any  # seconds on a CPU, an event on a GPU

PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context


class Streams:
    """A CPU's: what has been asked for has been done.

    Attributes:
        device: Where experts are computed.
        separate_memory: Whether its memory is another than the host's, so that experts are copied over from there.
    """

    device = torch.device("cpu")
    separate_memory = False

    def mark(self) -> Mark:
        """This moment of the calling thread's stream."""
        return time.perf_counter()

    def wait(self, mark: Mark) -> None:
        """Let what the calling thread asks for from now on begin after a mark. Returns at once."""

    @contextmanager
    def copying(self, after: Mark) -> Iterator[None]:
        """What the calling thread asks for in here is done on the stream for copies, after a mark."""
        yield

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Between two marks of the stream that computes, once it has got there."""
        return end - begin

    def drain(self) -> None:
        """Return when all copies are done."""

    def pin(self, memory: Tensor) -> None:
        """Keep host memory where it is, so that the device copies from it by itself.

        Raises:
            UserError: The system does not let so much be locked.
        """

    def unpin(self, memory: Tensor) -> None:
        """Undo `lock`; nothing may be copying from it."""


class CudaStreams(Streams):
    """A GPU's: torch's current stream computes, one of our own copies.

    That one does not wait for the default stream by itself (torch makes it non-blocking), so that both orders are
    the events' alone. The arena lies in the compute stream's memory and outlives the engine's copies (`drain`), so
    torch's allocator need not be told of the other stream (`Tensor.record_stream`).
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
        with torch.cuda.stream(self._copies):  # for the calling thread alone
            self._copies.wait_event(after)
            yield

    def seconds(self, begin: Mark, end: Mark) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def drain(self) -> None:
        self._copies.synchronize()

    def pin(self, memory: Tensor) -> None:
        # Not torch's pinned allocator: it rounds up to a power of two (pytorch issue 95823).
        with torch.cuda.device(self.device):
            failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
        if failed:
            raise UserError(
                f"offload: {memory.nbytes:,} bytes of host memory for experts could not be page-locked (CUDA error "
                f"{failed}): free memory, raise `ulimit -l`, or use backend=cpu, which keeps them on disk"
            )

    def unpin(self, memory: Tensor) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


def make_streams(device: torch.device) -> Streams:
    """Those of a backend's device."""
    return CudaStreams(device) if device.type == "cuda" else Streams()
