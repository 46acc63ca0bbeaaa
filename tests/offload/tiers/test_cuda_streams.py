"""Test the order of CUDA calls with a fake `torch.cuda` that makes every missing dependency fail.

Computing happens at once, as on a CPU. A copy happens as late as possible: when computing waits for its event or the
host waits for its stream. A copy must also wait for the last expert that used its slot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from two_tiers import TwoTiers

from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.offload.engine.engine import Engine
from haq_lab.offload.tiers.cuda_streams import CudaStreams, Streams, make_streams
from haq_lab.utils.errors import UserError


class FakeStream:
    """A fake CUDA stream.

    Attributes:
        asked: Number of operations so far.
        after: Operations of another stream that must be done before the next one.
    """

    def __init__(self, device: Any = None) -> None:
        self.asked = self.after = 0
        self._pending: list[Callable[[], None]] = []

    def ask(self, work: Callable[[], None] | None = None) -> None:
        self.asked += 1
        if work is not None:
            self._pending.append(work)

    def wait_event(self, event: FakeEvent) -> None:
        self.after = max(self.after, event.at)
        event.stream.run(event.at)

    def run(self, until: int) -> None:
        """Run the pending operations up to number `until`."""
        while self._pending and self.asked - len(self._pending) < until:
            self._pending.pop(0)()

    def synchronize(self) -> None:
        self.run(self.asked)

    @property
    def idle(self) -> bool:
        return not self._pending


class FakeEvent:
    """A fake CUDA event: a point in a stream."""

    def __init__(self, enable_timing: bool) -> None:
        self.timed = enable_timing

    def record(self, stream: FakeStream) -> None:
        self.stream, self.at = stream, stream.asked

    def synchronize(self) -> None:
        self.stream.run(self.at)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.timed
        assert end.timed
        assert self.stream is end.stream
        return 500.0


class FakeCuda:
    """Replaces what `CudaStreams` uses of torch.cuda. Each thread has its own current stream."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.compute, self.locked = FakeStream(), dict[int, int]()
        self.refuses = self.last_error = 0
        self._local = threading.local()
        runtime = type("Runtime", (), {"cudaHostRegister": self._lock, "cudaHostUnregister": self._unlock})
        for name, fake in {
            "Stream": FakeStream,
            "Event": FakeEvent,
            "current_device": lambda: 0,
            "current_stream": lambda device: self.current,
            "stream": self._stream,
            "device": self._device,
            "cudart": lambda: runtime,
        }.items():
            patch.setattr(torch.cuda, name, fake)
        self._ones = torch.ones
        patch.setattr(torch, "ones", self._kernel)
        patch.setattr(torch.cuda, "check_error", self._check)

    @property
    def current(self) -> FakeStream:
        return getattr(self._local, "stream", self.compute)

    @contextmanager
    def _stream(self, stream: FakeStream) -> Iterator[None]:
        self._local.stream = stream
        yield
        self._local.stream = self.compute

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        yield

    def _lock(self, address: int, size: int, flags: int) -> int:
        self.last_error = self.refuses
        if not self.refuses:
            self.locked[address] = size
        return self.refuses

    def _unlock(self, address: int) -> int:
        self.last_error = 0 if self.locked.pop(address, 0) else 1
        return self.last_error

    def _kernel(self, *size: Any, **settings: Any) -> Tensor:
        """Raise and clear the error of an earlier call, as torch does after each kernel."""
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")
        return self._ones(*size, **settings)

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture
def streams(cuda: FakeCuda) -> CudaStreams:
    """CUDA streams whose memory is on the CPU."""
    cuda_streams = make_streams(torch.device("cuda"))
    assert isinstance(cuda_streams, CudaStreams)
    assert cuda_streams.device == torch.device("cuda", 0)
    cuda_streams.device = torch.device("cpu")
    return cuda_streams


@pytest.fixture(scope="module")
def expected() -> TwoTiers:
    torch.set_num_threads(1)
    with torch.no_grad():
        return TwoTiers(CpuBackend(), Streams())


def watch(engine: Engine, cuda: FakeCuda, patch: pytest.MonkeyPatch) -> list[int]:
    """Delay the engine's copies and count its experts. Returns the number of copies in a list."""
    used: dict[int, int] = {}  # operation of the last expert by slot
    copied = [0]
    computes, reads = engine.expert, engine.slow_tier.read

    def expert(layer: int, number: int) -> None:
        computes(layer, number)
        cuda.compute.ask()
        used[engine.arena.blob((layer, number)).data_ptr()] = cuda.compute.asked

    def read(layer: int, number: int, blob: Tensor) -> None:
        stream = cuda.current
        assert stream is not cuda.compute, "copies have a stream of their own"
        assert stream.after >= used.get(blob.data_ptr(), 0), "the slot's last expert may still be computing"
        stream.ask(lambda: reads(layer, number, blob))
        copied[0] += 1

    patch.setattr(engine, "expert", expert)
    patch.setattr(engine.slow_tier, "read", read)
    return copied


@pytest.mark.parametrize("prefetch", [None, "path", "gate"])
@pytest.mark.parametrize(("rule", "slots", "spare"), [("lru", 1, 2), ("none", 3, 2), ("haq", 8, 3)])
def test_no_copy_and_no_expert_comes_too_early(expected, cuda, streams, monkeypatch, rule, slots, spare, prefetch):
    monkeypatch.setattr(expected, "streams", streams)
    engine, whole = expected.engine(rule, slots, spare=spare, prefetch=prefetch)
    copied = watch(engine, cuda, monkeypatch)
    assert torch.equal(expected.generate(whole), expected.expected)
    assert engine.counters.read.sum() == copied[0]
    assert engine.stats()["offload.waited_s"] % 0.5 == 0, "from events"
    assert engine.stats()["offload.waited_s"] > 0
    assert len(cuda.locked) == expected.depth
    streams._copies.ask(lambda: None)  # as after an unused prefetch
    engine.close()
    assert streams._copies.idle, "memory is freed after the copies are done"
    assert not cuda.locked


def test_copies_are_ordered_by_events_alone(cuda, streams):
    """A copy waits for its mark, and computing waits for the copy. After the block the stream is the former one."""
    cuda.compute.ask()
    computed = streams.mark()
    cuda.compute.ask()
    done: list[str] = []
    with streams.copying(computed):
        assert cuda.current.after == 1
        cuda.current.ask(lambda: done.append("copied"))
        there = streams.mark()
    assert cuda.current is cuda.compute
    assert done == []
    streams.wait(there)
    assert done == ["copied"]
    assert streams.seconds(streams.mark(), streams.mark()) == 0.5


def test_memory_that_cannot_be_pinned_raises(cuda, streams):
    memory = torch.zeros(4096, dtype=torch.uint8)
    cuda.refuses = 2
    with pytest.raises(UserError, match=r"4,096 bytes .* could not be page-locked \(CUDA error 2\).*backend=cpu"):
        streams.pin(memory)
    torch.ones(1, device=streams.device)  # the next kernel does not raise the error again
    cuda.refuses = 0
    streams.pin(memory)
    assert cuda.locked == {memory.data_ptr(): 4096}
    streams.unpin(memory)
    assert not cuda.locked
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        streams.unpin(memory)
    torch.ones(1, device=streams.device)


def test_a_cpus_marks_are_times():
    streams = make_streams(torch.device("cpu"))
    assert not streams.separate_memory
    begin = streams.mark()
    with streams.copying(begin):
        end = streams.mark()
    streams.wait(end)
    assert 0 <= streams.seconds(begin, end) < 1
