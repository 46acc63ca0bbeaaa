"""Experts on the move: out of the slow tier into slots of the arena, read by a thread of its own, and out of them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor, nn

from haq_lab.offload.engine.cost_feedback import CostFeedback
from haq_lab.offload.engine.counters import Counters
from haq_lab.offload.tiers.arena import Arena, Key
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.cuda_streams import Mark, Streams
from haq_lab.offload.tiers.disk import ReadError, bind


class Transfer:
    """Args:
    store: The slow tier.
    slots: Of the arena.
    counters: Of reads, and of how long computing waited for them.
    observer: Told of asking, reading and waiting.
    streams: Of the device that computes.

    Attributes:
        arena: The fast tier.
        layers: Each layer's experts, as far as they are attached.
    """

    def __init__(
        self, store: SlowTier, slots: int, counters: Counters, observer: CostFeedback | None, streams: Streams
    ):
        self.store, self.counters, self.observer, self.streams = store, counters, observer, streams
        self.arena = Arena(slots, store.blob_bytes, streams.device)
        self.layers: list[nn.ModuleList] = []
        self._reader = ThreadPoolExecutor(1, "expert-reader")
        self._reads: dict[Key, Future[tuple[float, Mark]]] = {}
        self._waits: list[tuple[int, Mark, Mark]] = []  # of computing for experts, by layer, not counted yet

    def attach(self, experts: nn.ModuleList) -> None:
        """The next layer's experts: their weights leave memory."""
        self.layers.append(experts)
        for number in range(len(experts)):
            self.bind((len(self.layers) - 1, number), None)

    def bind(self, key: Key, blob: Tensor | None) -> None:
        """Let an expert use the weights in a blob; None takes them away."""
        bind(self.layers[key[0]][key[1]], self.store.parts, blob)

    def coming(self, key: Key) -> bool:
        """Whether an expert is being read, or there and not taken over yet."""
        return key in self._reads

    def fetch(self, key: Key) -> None:
        """Ask for an expert; there must be a free slot. Returns at once."""
        self.arena.take(key)
        self.counters.read[key[0]] += 1
        asked = 0.0 if self.observer is None else self.observer.asks()
        computed = self.streams.mark()  # the slot's last expert among it
        self._reads[key] = self._reader.submit(self._read, key, self.arena.blob(key), asked, computed)

    def _read(self, key: Key, blob: Tensor, asked: float, computed: Mark) -> tuple[float, Mark]:
        """Read an expert once what had been asked for is computed; when that was over, by the observer's clock and by
        the stream's."""
        if self.observer is not None:
            self.observer.begins(asked)
        with self.streams.copying(computed):
            self.store.read(*key, blob)
            there = self.streams.mark()
        return 0.0 if self.observer is None else self.observer.fetched(self.store.moved_bytes), there

    def take_over(self, key: Key) -> float:
        """Let a coming expert be used, after its copy; when it was read, by the observer's clock.

        Raises:
            ReadError: It could not be read; its slot is free again.
        """
        try:
            fetched, there = self._reads.pop(key).result()
        except ReadError:
            self.arena.release(key)
            raise
        self.streams.wait(there)
        self.bind(key, self.arena.blob(key))
        return fetched

    def wait(self, key: Key) -> float:
        """The same where computing stands still for it, which counts."""
        if self.observer is not None:
            self.observer.waits()
        start = self.streams.mark()
        fetched = self.take_over(key)
        self._waits.append((key[0], start, self.streams.mark()))
        return fetched

    def remove(self, key: Key) -> None:
        """Out of the arena: a read that has not begun is called off, one that is under way ends first (on a GPU it is
        then under way on the stream for copies, as the slot's next one will be after it)."""
        if read := self._reads.pop(key, None):
            if read.cancel():
                self.counters.read[key[0]] -= 1
            else:
                read.exception()
        else:
            self.bind(key, None)
        self.arena.release(key)

    def settle(self) -> None:
        """Count how long computing has waited."""
        for layer, begin, end in self._waits:
            self.counters.waited[layer] += self.streams.seconds(begin, end)
        self._waits.clear()

    def stop(self) -> None:
        """End the reading thread, once all copies are done; the slow tier stays."""
        self._reader.shutdown()
        self.streams.drain()
