"""Serve a model's experts from two tiers, without a change in its output.

The fast tier is an arena of slots in the memory of the device that computes. The slow tier is pinned host memory for a
GPU (`tiers/pinned_host.py`) and a file for a CPU (`tiers/disk.py`). A policy decides which experts are resident in the
fast tier. A thread reads missing experts while the resident ones of the layer compute. Spare slots take prefetched
experts and missing experts that the policy does not admit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from haq_lab.models.families.family import Moe
from haq_lab.offload.engine.cost_feedback import CostFeedback
from haq_lab.offload.engine.counters import Counters
from haq_lab.offload.engine.recorder import Recorder
from haq_lab.offload.engine.transfer import Transfer
from haq_lab.offload.policies.policy import Policy, Visit
from haq_lab.offload.policies.prefetch import Prefetch
from haq_lab.offload.tiers.arena import Key
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import ReadError


@dataclass
class _Step:
    """State of the layer that is running.

    Attributes:
        waiting: Missing experts that have no slot yet.
        in_place: Experts that run in the slow tier, as modules bound to their weights there.
        passing: Experts that use a spare slot and are dropped after the layer.
    """

    waiting: list[Key] = field(default_factory=list)
    in_place: dict[Key, nn.Module] = field(default_factory=dict)
    passing: set[Key] = field(default_factory=set)


class Engine:
    """Moves experts between two tiers while a model runs.

    Args:
        slow_tier: Slow tier that holds all experts.
        policy: Policy that decides which experts are resident.
        spare: Slots in addition to the policy's, for prefetched and not admitted experts, for each layout of experts.
            At least 1; 2 or more let reads overlap with computing.
        prefetch: Predictor of the next layer's experts. None disables prefetching.
        guesses: Maximum number of experts to prefetch per layer. Less than `spare`.
        feedback: Corrects the cost model by the host's clock. Use it on a CPU only.
        streams: Streams of the device that computes. If None, the CPU computes.
        record: Whether to record each step. A model that runs for days would fill memory with its records.

    Attributes:
        recorder: Records the routing decisions and prefetch guesses.
        counters: Counts hits, misses and bytes moved, per layer and expert.

    Example:
        >>> engine = Engine(slow_tier, policy, spare=2)  # doctest: +SKIP
        >>> engine.attach(layers, family.moe)  # doctest: +SKIP
        >>> model.assemble(layers)(tokens)  # doctest: +SKIP
        >>> engine.stats()  # doctest: +SKIP
    """

    def __init__(
        self,
        slow_tier: SlowTier,
        policy: Policy,
        spare: int = 2,
        prefetch: Prefetch | None = None,
        guesses: int = 0,
        feedback: CostFeedback | None = None,
        streams: Streams | None = None,
        record: bool = True,
    ):
        layers, self.experts = policy.resident.shape
        assert 0 <= guesses < spare, "guesses must be less than spare, because a missing expert needs a spare slot"
        self.slow_tier, self.policy, self.prefetch, self.guesses = slow_tier, policy, prefetch, guesses
        self.feedback, self.recorder, self._record = feedback, Recorder(layers, self.experts), record
        self.counters = Counters(slow_tier.moved_bytes)
        layouts = slow_tier.layouts
        residents = np.bincount(layouts.index[policy.resident], minlength=len(layouts.distinct))
        slots = (residents + spare).tolist()  # of each layout
        self.transfer = Transfer(slow_tier, slots, self.counters, feedback, streams or Streams())
        self.arena = self.transfer.arena
        self._counted: tuple[dict[str, float], list[dict[str, Any]]] | None = None  # the results of `counting`
        self._guessed: dict[Key, None] = {}  # prefetched for the next layer, in order
        self._step = _Step()
        self._counts = np.zeros(self.experts, np.int64)  # tokens per expert in the current layer

    def attach(self, layers: list[nn.Module], moe: Moe) -> None:
        """Route the layers' experts through the engine, and load the experts that are resident at the start.

        The experts' own weights are freed.

        Args:
            layers: All decoder layers.
            moe: Description of the family's MoE block.

        Raises:
            ReadError: An expert could not be read.
        """
        for index, layer in enumerate(layers):
            experts = cast(nn.ModuleList, layer.get_submodule(moe.experts))
            self.transfer.attach(experts)
            _intercept(self, index, experts)
        initial = [(int(layer), int(number)) for layer, number in zip(*np.nonzero(self.policy.resident), strict=True)]
        for key in initial:
            self.transfer.fetch(key)
        for key in initial:
            self.transfer.take_over(key)
        self._start_counting()

    def begin(self, layer: int, hidden: Tensor, chosen: Tensor) -> list[int]:
        """Start a layer: evict, fetch and prefetch experts according to the router's choice.

        Several tokens at once are a prompt or an evaluation window, so a new sequence begins.

        Args:
            layer: Index of the layer.
            hidden: (t, d) hidden states that enter the MoE block.
            chosen: (t, k) chosen experts, on the CPU.

        Returns:
            The chosen experts in the order in which they should run, resident ones first.
        """
        counts = torch.bincount(chosen.flatten(), minlength=self.experts).numpy()
        self.transfer.settle()
        if self.feedback is not None:
            self.feedback.on_routing(layer, len(chosen))
        self._drop_wrong_guesses(layer, counts)
        if self.feedback is not None:
            self.feedback.on_guesses_dropped()
        if layer == 0 and len(chosen) > 1:
            self.policy.begin()
        visit = self.policy.visit(layer, counts, len(chosen))
        self.counters.visit(layer, len(chosen), counts, visit.missing)
        self._step = _Step()
        if self.feedback is not None:
            self._predict(layer, counts, visit)
        for number in visit.missing:
            key = (layer, number)
            if number in visit.in_place and key not in self._guessed:
                module = self.transfer.layers[layer][number]
                self._step.in_place[key] = self.slow_tier.use_in_place(layer, number, module)
                continue
            if number in visit.replaces:
                self._evict(visit.replaces[number])
            else:
                self._step.passing.add(key)
            if key in self._guessed:
                self._guessed.pop(key)
                self.counters.guesses_used[layer] += 1
            else:
                self._step.waiting.append(key)
        # Admitted experts first: each has a free slot. The others share the spare slots.
        self._step.waiting.sort(key=lambda key: key in self._step.passing)
        requested = len(self._step.waiting)
        self._fetch_waiting()
        guesses: list[int] = []
        if self.prefetch is not None and layer + 1 < len(self.transfer.layers):
            guesses = self.prefetch.guess(layer, hidden, chosen, self.guesses)
            self._prefetch(layer, guesses)
        if self._record and self._counted is None:
            self.recorder.record(layer, chosen, guesses)
        self._counts = counts
        if self.feedback is not None:
            self.feedback.on_requests_sent(requested + len(self._guessed))
        return sorted(visit.wanted, key=partial(self._run_order, layer, visit))

    def _run_order(self, layer: int, visit: Visit, number: int) -> int:
        """Return the sort key of an expert: resident, then in place, then being read, then without a slot."""
        key = (layer, number)
        if number not in visit.missing:
            return 0
        if key in self._step.in_place:
            return 1
        return 2 if key in self.arena.slot_of else 3

    def expert(self, layer: int, number: int) -> nn.Module:
        """Return an expert with its weights bound, and wait for them if necessary.

        Args:
            layer: Index of the layer.
            number: Index of the expert.

        Raises:
            ReadError: The weights could not be read. The expert is then not resident, and the engine can go on.
        """
        key = (layer, number)
        if key in self._step.waiting:
            self._free_spare_slots(key)
            self._fetch_waiting()
        fetched = None
        if self.transfer.coming(key):
            try:
                fetched = self.transfer.wait(key)
            except ReadError:
                self.policy.resident[key] = False
                self._step.passing.discard(key)
                raise
        if self.feedback is not None:
            self.feedback.on_expert_start(int(self._counts[number]), key in self._step.in_place, fetched)
        return self._step.in_place.get(key, self.transfer.layers[layer][number])

    @property
    def beside(self) -> bool:
        """Whether some experts of the current layer run on the CPU while the GPU runs the others."""
        return self.transfer.streams.separate_memory and bool(self._step.in_place)

    def end(self, layer: int) -> None:
        """Finish a layer: free the spare slots.

        Args:
            layer: Index of the layer.
        """
        if self.feedback is not None:
            self.feedback.on_experts_end()
        if self._step.in_place:
            self.slow_tier.end_use(list(self._step.in_place.values()))
        for key in self._step.waiting:  # not empty only if a read failed, so these were never loaded
            self.policy.resident[key] = False
        for key in [key for key in self._step.passing if key in self.arena.slot_of]:
            self.transfer.remove(key)
        self._step = _Step()
        if self.feedback is not None:
            self.feedback.on_cleanup_end(layer)

    def _fetch_waiting(self) -> None:
        for key in [*self._step.waiting]:
            if self.arena.free(key):
                self._step.waiting.remove(key)
                self.transfer.fetch(key)

    def _evict(self, key: Key) -> None:
        if key in self.arena.slot_of:  # after a failed read it has no slot
            self.transfer.remove(key)

    def _free_spare_slots(self, needed: Key) -> None:
        """Free slots that `needed` fits: those of experts in spare slots that have run, or of one prefetched expert."""
        if self.arena.free(needed):
            return
        index = self.slow_tier.layouts.index
        done = [key for key in self._step.passing if key in self.arena.slot_of and not self.transfer.coming(key)]
        done = [key for key in done if index[key] == index[needed]]
        for key in done or [key for key in self._guessed if index[key] == index[needed]][:1]:
            self._guessed.pop(key, None)
            self._step.passing.discard(key)
            self.transfer.remove(key)

    def _prefetch(self, layer: int, numbers: list[int]) -> None:
        for number in numbers:
            key = (layer + 1, number)
            if key in self.arena.slot_of or not self.arena.free(key) or self._step.waiting:
                continue
            self.transfer.fetch(key)
            self._guessed[key] = None
            self.counters.guessed[layer + 1] += 1

    def _drop_wrong_guesses(self, layer: int, counts: NDArray[np.int64]) -> None:
        for key in [key for key in self._guessed if key[0] != layer or counts[key[1]] == 0]:
            self._guessed.pop(key)
            self.transfer.remove(key)

    def _predict(self, layer: int, counts: NDArray[np.int64], visit: Visit) -> None:
        """Give the cost feedback the experts that this layer needs, by how they are served."""
        assert self.feedback is not None

        def with_tokens(numbers: list[int]) -> dict[int, int]:
            return {number: int(counts[number]) for number in numbers}

        prefetched = {number for at, number in self._guessed if at == layer}
        hits = [number for number in visit.wanted if number not in visit.missing or number in prefetched]
        in_place = [number for number in visit.in_place if number not in prefetched]
        fetched = [number for number in visit.missing if number not in in_place and number not in prefetched]
        self.feedback.predict(with_tokens(hits), with_tokens(fetched), with_tokens(in_place))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Report only the steps within the block by `stats`, `table` and `recorder`. Use it between two steps."""
        self._start_counting()
        yield
        self._counted = self.stats(), self.table()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the steps within the block out of `stats`, `table` and `recorder`. Use it between two steps."""
        kept = self.recorder, self.counters, self._counted
        times = None if self.feedback is None else (self.feedback.predicted, self.feedback.measured)
        self._start_counting()
        yield
        self.transfer.settle()
        self.recorder, self.counters, self._counted = kept
        self.transfer.counters = self.counters
        if self.feedback is not None and times is not None:
            self.feedback.predicted, self.feedback.measured = times

    def _start_counting(self) -> None:
        """Forget all that was counted and recorded so far."""
        self.transfer.settle()
        self._counted = None
        layers = len(self.transfer.layers)
        self.recorder = Recorder(layers, self.experts)
        self.counters = self.transfer.counters = Counters(self.slow_tier.moved_bytes)
        if self.feedback is not None:
            self.feedback.predicted, self.feedback.measured = [], []

    def stats(self) -> dict[str, float]:
        """Return the metrics by their full names.

        They cover all steps since `attach`, or those within `counting`. Hit rates and values per token are left out if
        no layer has run.
        """
        if self._counted is not None:
            return self._counted[0]
        self.transfer.settle()
        stats = self.counters.metrics() | {
            "offload.fast_tier_bytes": float(self.arena.bytes),
            "offload.slots": float(self.policy.slots),
        }
        if self.feedback is not None and self.feedback.measured:
            stats["predictor.mape"] = self.feedback.mape()
        if self.prefetch is not None:
            stats["offload.prefetch_accuracy"] = self.counters.prefetch_accuracy()
        return stats

    def table(self) -> list[dict[str, Any]]:
        """Return one row per layer: resident experts, hits, misses, bytes moved and prefetches.

        It covers the same steps as `stats`.
        """
        if self._counted is not None:
            return self._counted[1]
        self.transfer.settle()
        return [
            {"layer": layer, "resident": " ".join(map(str, np.flatnonzero(resident)))} | row
            for layer, (resident, row) in enumerate(zip(self.policy.resident, self.counters.rows(), strict=True))
        ]

    def check(self) -> None:
        """Assert the invariants that hold between two layers."""
        self.arena.check()
        residents = {(int(layer), int(number)) for layer, number in zip(*np.nonzero(self.policy.resident), strict=True)}
        expected = residents | set(self._guessed)
        assert expected == set(self.arena.slot_of), "the resident experts are not those that have a slot"

    def close(self) -> None:
        """Stop the reading thread and close the slow tier."""
        self.transfer.stop()
        self.slow_tier.close()


def _intercept(engine: Engine, layer: int, experts: nn.ModuleList) -> None:
    """Wrap a layer's experts: the engine starts and ends the layer and provides each expert."""
    forward: Callable[..., Tensor] = experts.forward

    def forward_with_engine(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        module: Any = experts
        on_cpu = chosen.cpu()  # on a GPU the host waits for the router here, and nowhere else in the layer
        module.order, module.beside = engine.begin(layer, hidden, on_cpu), engine.beside
        try:
            return forward(hidden, on_cpu, weights)
        finally:
            engine.end(layer)

    cast(Any, experts).forward, cast(Any, experts).expert = forward_with_engine, partial(engine.expert, layer)
