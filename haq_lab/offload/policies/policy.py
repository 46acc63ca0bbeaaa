"""Decide which experts are resident, and what changes when a layer is visited.

The same policy drives the engine, which moves bytes, the simulator, which moves a virtual clock, and the replay of a
trace, which only counts.

    policy = make_policy("haq", place("two_stage", profile, slots), profile)
    visit = policy.visit(layer, counts, tokens)      # engine, simulator: one layer of one step
    rates = policy.replay(trace)                     # counts of a whole trace
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.policies import eviction as cache
from haq_lab.offload.policies.eviction_rules import EVICTION_RULES
from haq_lab.offload.policies.path_model import PathModel
from haq_lab.routing.statistics import Residency
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import invalid

Scope = Literal["layer", "global"]


# Maps {resident expert: tokens} and {missing expert: tokens} to the missing experts that run in the slow tier.
Decide = Callable[[dict[int, int], dict[int, int]], list[int]]


def _fetch_all(resident: dict[int, int], missing: dict[int, int]) -> list[int]:
    return []


@dataclass(frozen=True)
class Visit:
    """Result of one visit of a layer.

    Attributes:
        wanted: Experts that the layer chose.
        missing: The wanted experts that were not resident.
        in_place: The missing experts that run in the slow tier, where their weights are.
        replaces: The evicted (layer, expert) by admitted expert. A missing expert without an entry is used once and
            not kept.
    """

    wanted: list[int]
    missing: list[int]
    in_place: list[int]
    replaces: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class HitRates:
    """Hit rates and counts of a replay.

    Attributes:
        pairs: Share of (token, expert) choices whose expert was resident.
        experts: Share of the distinct experts of a visit that were resident.
        by_layer: (layers,) the hit rate `pairs` of each layer.
        fetched: Number of misses.
        tokens: Number of tokens in the trace.
    """

    pairs: float
    experts: float
    by_layer: NDArray[np.float64]
    fetched: int
    tokens: int

    @property
    def layer_std(self) -> float:
        """Return the standard deviation of the hit rate over the layers."""
        return float(self.by_layer.std())


class Policy:
    """An eviction rule and the map of resident experts that it changes.

    Args:
        state: State of the rule (`lru.py`, ...).
        resident: (layers, E) bool, the experts that are resident at the start. It is copied.
        scope: `layer` if an expert may evict only experts of its own layer, `global` if any.
        selective: Whether a missing expert that is worth less than every resident one is not kept.
        admits: Whether missing experts become resident at all.
        forms: (layers, E) int64. An expert may evict only experts of the same form, so the number of residents of each
            form does not change. None if all experts have the same form.

    Attributes:
        decide: Returns the missing experts that run in the slow tier. By default all are fetched.
    """

    def __init__(
        self,
        state: Any,
        resident: Residency,
        scope: Scope,
        selective: bool = False,
        admits: bool = True,
        forms: NDArray[np.int64] | None = None,
    ):
        self.decide: Decide = _fetch_all
        self.state = state
        self.resident = resident.copy()
        self.per_layer = scope == "layer"
        self.selective = selective
        self.admits = admits
        self.forms = np.zeros(resident.shape, np.int64) if forms is None else forms
        self._forms = None if forms is None or (forms == forms.flat[0]).all() else forms.ravel()
        self._placed = np.zeros(resident.shape[1], np.int64)
        self._admit = np.zeros(resident.shape[1], np.bool_)
        self._clock = 0

    @property
    def slots(self) -> int:
        """Return the number of resident experts. It never changes."""
        return int(self.resident.sum())

    def begin(self) -> None:
        """Start a sequence."""
        cache.begin(self.state)

    def visit(self, layer: int, counts: NDArray[np.int64], tokens: int) -> Visit:
        """Record the choices of a layer, and evict and admit experts.

        Args:
            layer: Index of the layer.
            counts: (E,) int64, how many tokens chose each expert.
            tokens: Number of tokens in this step.

        Returns:
            The experts that were missing, and what replaced them.
        """
        wanted = np.flatnonzero(counts)
        missing = wanted[~self.resident[layer, wanted]]
        if layer == 0:
            self._clock += tokens
        hits = {int(one): int(counts[one]) for one in wanted if self.resident[layer, one]}
        in_place = self.decide(hits, {int(one): int(counts[one]) for one in missing})
        self._admit[:] = self.admits
        self._admit[in_place] = False
        now = self._clock - 1
        switches = (self.per_layer, self.selective, self._admit)
        cache.visit(self.state, self.resident, layer, wanted, counts, tokens, now, *switches, self._placed, self._forms)
        experts = self.resident.shape[1]
        replaces = {int(one): divmod(int(self._placed[one]), experts) for one in missing if self._placed[one] >= 0}
        return Visit(wanted.tolist(), missing.tolist(), in_place, replaces)

    def replay(self, trace: Trace) -> HitRates:
        """Replay a whole trace and count its hits.

        Args:
            trace: The trace to replay.

        Raises:
            UserError: The trace has another number of layers or experts.
        """
        trace.must_be_of(*self.resident.shape)
        tallies = cache.empty_counts(trace.layers)
        arrays = (
            np.asarray(each) for each in (trace.experts, trace.decode, trace.starts)
        )  # numba does not accept a memmap
        self._admit[:] = self.admits
        switches = (self.per_layer, self.selective, self._admit)
        room = np.zeros((3, trace.expert_count), np.int64)
        cache.replay(self.state, self.resident, *arrays, self._clock, *switches, room, tallies, self._forms)
        self._clock += trace.tokens
        return HitRates(
            pairs=float(tallies.pair_hits.sum() / tallies.pairs.sum()),
            experts=float(tallies.expert_hits.sum() / tallies.experts.sum()),
            by_layer=tallies.pair_hits / tallies.pairs,
            fetched=int(tallies.fetched.sum()),
            tokens=trace.tokens,
        )


def make_policy(
    rule: str,
    resident: Residency,
    profile: Trace,
    scope: Scope = "global",
    path_model: PathModel | None = None,
    forms: NDArray[np.int64] | None = None,
) -> Policy:
    """Make the policy of an eviction rule.

    Args:
        rule: A name in `EVICTION_RULES`.
        resident: (layers, E) bool, the experts that are resident at the start.
        profile: Calibration trace. For `belady`, the trace that will be replayed.
        scope: `layer` if an expert may evict only experts of its own layer, `global` if any.
        path_model: For `haq`. If None, one is fitted on the profile.
        forms: (layers, E) int64, the experts' forms. None if all have the same.

    Returns:
        The policy, before its first visit.

    Raises:
        UserError: There is no such rule.
    """
    if rule not in EVICTION_RULES:
        raise invalid("offload.eviction", rule, EVICTION_RULES)
    row = EVICTION_RULES[rule]
    state = row.make_state((resident.shape[0], resident.shape[1]), profile, path_model)
    return Policy(state, resident, scope, row.selective, row.admits, forms)
