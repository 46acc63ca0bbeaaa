"""The engine: a model whose experts live on two tiers, computing exactly what it would with all of them in memory.

The fast tier is an arena in the memory of the device that computes: a GPU's, with the slow tier in the host's memory
(`host_tier.py`), or RAM, with the slow tier a file (`store.py`). A policy says which experts stay. A thread reads
missing experts while the layer's resident ones compute; a missing expert that the policy does not admit, and every
prefetched one, passes through a few spare slots of the same arena.

    engine = Engine(store, policy, spare=2)
    engine.attach(layers, family.moe)
    ... the model runs ...
    engine.stats()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from haq_lab.models.architectures import Moe
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
    """A layer's visit in progress: missing experts without a slot yet, those that run in the slow tier (as they are
    there), and those that pass through a spare slot."""

    waiting: list[Key] = field(default_factory=list)
    in_place: dict[Key, nn.Module] = field(default_factory=dict)
    passing: set[Key] = field(default_factory=set)


class Engine:
    """Args:
    store: The slow tier.
    policy: Which experts are resident.
    spare: Slots beside the policy's, for experts that pass through and for guesses; at least 1, 2 to overlap.
    prefetch: Guesses the next layer's experts.
    guesses: At most so many experts are read ahead.
    observer: Told when everything happens, by the host's clock: for a CPU.
    streams: Of the device that computes; a CPU's if None.

    Attributes:
        heard: What the layers chose, and what was guessed.
    """

    def __init__(
        self,
        store: SlowTier,
        policy: Policy,
        spare: int = 2,
        prefetch: Prefetch | None = None,
        guesses: int = 0,
        observer: CostFeedback | None = None,
        streams: Streams | None = None,
    ):
        layers, self.experts = policy.resident.shape
        assert 0 <= guesses < spare, "a missing expert needs a spare slot"
        self.store, self.policy, self.prefetch, self.guesses = store, policy, prefetch, guesses
        self.observer, self.heard = observer, Recorder(layers, self.experts)
        self.counters = Counters(layers, store.moved_bytes)
        self.mover = Transfer(store, policy.slots + spare, self.counters, observer, streams or Streams())
        self.arena = self.mover.arena
        self._guessed: dict[Key, None] = {}  # read ahead for the coming layer
        self._step = _Step()
        self._counts = np.zeros(self.experts, np.int64)  # tokens of the layer at work, by expert

    # Putting it in place.

    def attach(self, layers: list[nn.Module], moe: Moe) -> None:
        """Take the layers' experts over: their weights leave memory, and the placed ones come in from the store."""
        for index, layer in enumerate(layers):
            experts = cast(nn.ModuleList, layer.get_submodule(moe.experts))
            self.mover.attach(experts)
            _intercept(self, index, experts)
        placed = [(int(index), int(number)) for index, number in zip(*np.nonzero(self.policy.resident), strict=True)]
        for key in placed:
            self.mover.fetch(key)
        for key in placed:
            self.mover.take_over(key)

    # One layer's visit.

    def begin(self, layer: int, hidden: Tensor, chosen: Tensor) -> list[int]:
        """The layer's router has chosen (t, k) experts, known on the CPU, for hidden states (t, d).

        More than one token at once is a prompt, or an evaluation's window: a sequence begins.

        Returns:
            The experts in the order in which they should run: those in memory first.
        """
        counts = torch.bincount(chosen.flatten(), minlength=self.experts).numpy()
        self.mover.settle()
        if self.observer is not None:
            self.observer.chosen(layer, len(chosen))
        self._drop_wrong_guesses(layer, counts)
        if self.observer is not None:
            self.observer.decides()
        if layer == 0 and len(chosen) > 1:
            self.policy.begin()
        visit = self.policy.visit(layer, counts, len(chosen))
        self.counters.visit(layer, counts, visit.missing)
        self._step = _Step()
        if self.observer is not None:
            self._report(layer, counts, visit)
        for number in visit.missing:
            key = (layer, number)
            if number in visit.in_place and key not in self._guessed:
                self._step.in_place[key] = self.store.in_place(layer, number, self.mover.layers[layer][number])
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
        # Admitted experts have a slot for certain, the ones passing through take turns.
        self._step.waiting.sort(key=lambda key: key in self._step.passing)
        asked = len(self._step.waiting)
        self._issue()
        guesses: list[int] = []
        if self.prefetch is not None and layer + 1 < len(self.mover.layers):
            guesses = self.prefetch.guess(layer, hidden, chosen, self.guesses)
            self._guess(layer, guesses)
        self.heard.note(layer, chosen, guesses)
        self._counts = counts
        if self.observer is not None:
            self.observer.issued(asked + len(self._guessed))
        return sorted(visit.wanted, key=partial(self._turn, layer, visit))

    def _turn(self, layer: int, visit: Visit, number: int) -> int:
        """Those in memory first, then those in place while others are read, then these, then those without a slot."""
        key = (layer, number)
        if number not in visit.missing:
            return 0
        if key in self._step.in_place:
            return 1
        return 2 if key in self.arena.where else 3

    def expert(self, layer: int, number: int) -> nn.Module:
        """The expert, its weights in memory; waits for them where they are not.

        Raises:
            ReadError: They could not be read. The expert is then not resident, and the engine can go on.
        """
        key = (layer, number)
        if key in self._step.waiting:
            self._release_passed()
            self._issue()
        fetched = None
        if self.mover.coming(key):
            try:
                fetched = self.mover.wait(key)
            except ReadError:
                self.policy.resident[key] = False
                self._step.passing.discard(key)
                raise
        if self.observer is not None:
            self.observer.starts(int(self._counts[number]), key in self._step.in_place, fetched)
        return self._step.in_place.get(key, self.mover.layers[layer][number])

    @property
    def beside(self) -> bool:
        """Whether some of the visit's experts run beside the device that runs the others."""
        return self.mover.streams.apart and bool(self._step.in_place)

    def end(self, layer: int) -> None:
        """The layer is done: spare slots are free again."""
        if self.observer is not None:
            self.observer.computed()
        if self._step.in_place:
            self.store.leave(list(self._step.in_place.values()))
        for key in self._step.waiting:  # only where a read failed: what was admitted has not come
            self.policy.resident[key] = False
        for key in [key for key in self._step.passing if key in self.arena.where]:
            self.mover.remove(key)
        self._step = _Step()
        if self.observer is not None:
            self.observer.finished(layer)

    # Moving experts.

    def _issue(self) -> None:
        while self._step.waiting and self.arena.free:
            self.mover.fetch(self._step.waiting.pop(0))

    def _evict(self, key: Key) -> None:
        if key in self.arena.where:  # a failed read may have left it without
            self.mover.remove(key)

    def _release_passed(self) -> None:
        """Make room: of the experts that pass through, those that have been computed are done with."""
        if self.arena.free:
            return
        done = [key for key in self._step.passing if key in self.arena.where and not self.mover.coming(key)]
        for key in done or list(self._guessed)[:1]:
            self._guessed.pop(key, None)
            self._step.passing.discard(key)
            self.mover.remove(key)

    # Guesses.

    def _guess(self, layer: int, numbers: list[int]) -> None:
        for number in numbers:
            key = (layer + 1, number)
            if key in self.arena.where or not self.arena.free or self._step.waiting:
                continue
            self.mover.fetch(key)
            self._guessed[key] = None
            self.counters.guessed[layer + 1] += 1

    def _drop_wrong_guesses(self, layer: int, counts: NDArray[np.int64]) -> None:
        for key in [key for key in self._guessed if key[0] != layer or counts[key[1]] == 0]:
            self._guessed.pop(key)
            self.mover.remove(key)

    # Looking in.

    def _report(self, layer: int, counts: NDArray[np.int64], visit: Visit) -> None:
        """Tell the observer what a visit needs."""
        assert self.observer is not None

        def of(numbers: list[int]) -> dict[int, int]:
            return {number: int(counts[number]) for number in numbers}

        hits = of([one for one in visit.wanted if one not in visit.missing or (layer, one) in self._guessed])
        placed = of([one for one in visit.in_place if (layer, one) not in self._guessed])
        fetched = of([one for one in visit.missing if one not in placed and (layer, one) not in self._guessed])
        self.observer.expects(hits, fetched, placed)

    def stats(self) -> dict[str, float]:
        """Metrics by their full names; no hit rates where no expert was asked for."""
        self.mover.settle()
        stats = self.counters.metrics() | {
            "offload.fast_tier_bytes": float(self.arena.bytes),
            "offload.slots": float(self.policy.slots),
        }
        if self.observer is not None and self.observer.measured:
            stats["predictor.mape"] = self.observer.mape()
        if self.prefetch is not None:
            stats["offload.prefetch_accuracy"] = self.counters.prefetch_accuracy()
        return stats

    def table(self) -> list[dict[str, Any]]:
        """A row for each layer: residents, hits, misses, bytes, prefetches."""
        self.mover.settle()
        return [
            {"layer": layer, "resident": " ".join(map(str, np.flatnonzero(resident)))} | row
            for layer, (resident, row) in enumerate(zip(self.policy.resident, self.counters.rows(), strict=True))
        ]

    def check(self) -> None:
        """Assert the invariants that hold between two layers."""
        self.arena.check()
        residents = {(int(layer), int(one)) for layer, one in zip(*np.nonzero(self.policy.resident), strict=True)}
        assert residents | set(self._guessed) == set(self.arena.where), "residents and slots differ"

    def close(self) -> None:
        """Stop reading and close the slow tier."""
        self.mover.stop()
        self.store.close()


def _intercept(engine: Engine, layer: int, experts: nn.ModuleList) -> None:
    """Route a layer's experts through the engine: its visit before they run, and each one's weights before it does."""
    forward: Callable[..., Tensor] = experts.forward

    def visited(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        module: Any = experts
        known = chosen.cpu()  # on a GPU, the one wait for the router in a visit
        module.order, module.beside = engine.begin(layer, hidden, known), engine.beside
        try:
            return forward(hidden, known, weights)
        finally:
            engine.end(layer)

    cast(Any, experts).forward, cast(Any, experts).expert = visited, partial(engine.expert, layer)
