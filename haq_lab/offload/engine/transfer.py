"""Read experts from the slow tier into arena slots with a background thread, and remove them again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor, nn

from haq_lab.offload.engine.cost_feedback import CostFeedback
from haq_lab.offload.engine.counters import Counters
from haq_lab.offload.tiers.arena import Arena, Key
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.cuda_streams import Mark, Streams
from haq_lab.offload.tiers.disk import ReadError, bind, unbind


class Transfer:
    """Moves experts into and out of the fast tier.

    Args:
        slow_tier: Slow tier that holds all experts.
        slots: Number of slots of the fast tier for each layout of experts.
        counters: Counts the reads and the seconds that computing waits for them.
        feedback: Measures requests, reads and waits. None disables it.
        streams: Streams of the device that computes.

    Attributes:
        arena: The fast tier.
        layers: Expert modules of each attached layer.
    """

    def __init__(
        self,
        slow_tier: SlowTier,
        slots: Sequence[int],
        counters: Counters,
        feedback: CostFeedback | None,
        streams: Streams,
    ):
        self.slow_tier, self.counters, self.feedback, self.streams = slow_tier, counters, feedback, streams
        self.arena = Arena(slots, slow_tier.layouts, streams.device)
        self.layers: list[nn.ModuleList] = []
        self._reader = ThreadPoolExecutor(1, "expert-reader")
        self._reads: dict[Key, Future[tuple[float, Mark]]] = {}
        self._waits: list[tuple[int, Mark, Mark]] = []  # layer, begin and end; not yet in the counters

    def attach(self, experts: nn.ModuleList) -> None:
        """Register the next layer's experts and free their weights."""
        self.layers.append(experts)
        for expert in experts:
            unbind(expert)

    def coming(self, key: Key) -> bool:
        """Return whether an expert has been requested and not taken over yet."""
        return key in self._reads

    def fetch(self, key: Key) -> None:
        """Request an expert and return at once. There must be a free slot for it."""
        self.arena.take(key)
        self.counters.read[key] += 1
        requested_at = 0.0 if self.feedback is None else self.feedback.on_request()
        computed = self.streams.mark()  # includes the last use of the slot
        self._reads[key] = self._reader.submit(self._read, key, self.arena.blob(key), requested_at, computed)

    def _read(self, key: Key, blob: Tensor, requested_at: float, computed: Mark) -> tuple[float, Mark]:
        """Read an expert after all computing that was submitted before the request.

        Returns:
            End of the read as seconds of the feedback's clock, and as a mark of the copy stream.
        """
        if self.feedback is not None:
            self.feedback.on_fetch_start(requested_at)
        with self.streams.copying(computed):
            self.slow_tier.read(*key, blob)
            copied = self.streams.mark()
        moved = int(self.slow_tier.moved_bytes[key])
        return 0.0 if self.feedback is None else self.feedback.on_fetch_end(moved), copied

    def take_over(self, key: Key) -> float:
        """Wait until a requested expert is read, and bind its weights.

        Returns:
            End of the read in seconds of the feedback's clock.

        Raises:
            ReadError: The expert could not be read. Its slot is free again.
        """
        try:
            fetched, copied = self._reads.pop(key).result()
        except ReadError:
            self.arena.release(key)
            raise
        self.streams.wait(copied)
        layer, number = key
        bind(self.layers[layer][number], self.slow_tier.layouts.of(layer, number).parts, self.arena.blob(key))
        return fetched

    def wait(self, key: Key) -> float:
        """Do the same as `take_over`, and count the time as waiting."""
        if self.feedback is not None:
            self.feedback.on_wait()
        start = self.streams.mark()
        fetched = self.take_over(key)
        self._waits.append((key[0], start, self.streams.mark()))
        return fetched

    def remove(self, key: Key) -> None:
        """Free an expert's slot.

        A read that has not started is cancelled. A read in progress is completed first. On a GPU its copy may still be
        running; the next copy into the slot follows it on the same stream.
        """
        if read := self._reads.pop(key, None):
            if read.cancel():
                self.counters.read[key] -= 1
            else:
                read.exception()
        else:
            unbind(self.layers[key[0]][key[1]])
        self.arena.release(key)

    def settle(self) -> None:
        """Add the finished waits to the counters."""
        for layer, begin, end in self._waits:
            self.counters.waited[layer] += self.streams.seconds(begin, end)
        self._waits.clear()

    def stop(self) -> None:
        """Stop the reading thread after all copies are done. The slow tier stays open."""
        self._reader.shutdown()
        self.streams.drain()
