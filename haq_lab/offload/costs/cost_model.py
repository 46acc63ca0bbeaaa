"""The latency predictor: what an expert costs to run, here or there, and to fetch; and where each one should run.

Costs are piecewise linear, fitted on micro-benchmarks (`measured_costs.py`) or taken from a machine's figures
(`machine_costs.py`). A running engine corrects them by what everything takes (`observer.py`). The objective is the sum
of all costs (Fiddler's code) or when the last of the fast device, the link and the CPU is done, which work at the same
time (Fiddler's comment; arXiv 2402.07033).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np

Objective = Literal["sum", "max"]
EXACT_UP_TO = 12  # missing experts whose every split is tried; beyond, only splits by the number of tokens
MEMORY = 0.998  # of a correction that the next measurement leaves, once there were many


@dataclass
class PiecewiseLinear:
    """Seconds as a function of a size: straight lines between measured points, the last one going on.

    Attributes:
        sizes: Rising.
        seconds: At these sizes.
        correction: What the curve is multiplied by; moves with `observe`.
        observed: Measurements that it has moved by.
    """

    sizes: Sequence[float]
    seconds: Sequence[float]
    correction: float = field(default=1.0)
    observed: int = field(default=0)

    def __call__(self, size: float) -> float:
        """Seconds for a size; 0 for none."""
        if size <= 0:
            return 0.0
        return self.correction * self._curve(size)

    def _curve(self, size: float) -> float:
        if size <= self.sizes[-1] or len(self.sizes) == 1:
            return float(np.interp(size, self.sizes, self.seconds))
        (x0, x1), (y0, y1) = self.sizes[-2:], self.seconds[-2:]
        return float(y1 + (y1 - y0) / (x1 - x0) * (size - x1))

    def observe(self, size: float, seconds: float) -> None:
        """Move towards a measurement: the mean of all so far, later of the latest. A curve of no seconds has nothing to
        correct."""
        if predicted := self._curve(size):
            self.observed += 1
            weight = max(1 / self.observed, 1 - MEMORY)
            self.correction += weight * (seconds / predicted - self.correction)

    @classmethod
    def fitted(cls, samples: Sequence[tuple[float, float]]) -> PiecewiseLinear:
        """The median at each size of (size, seconds) samples, made not to fall."""
        sizes = sorted({size for size, _ in samples})
        medians = [float(np.median([seconds for at, seconds in samples if at == size])) for size in sizes]
        return cls(sizes, np.maximum.accumulate(medians).tolist())


@dataclass
class Costs:
    """Seconds of everything that a layer's experts can need.

    Attributes:
        fast: One expert on the fast device, by tokens.
        slow: One expert where its weights lie in the slow tier, by tokens.
        fetch: One expert's bytes into the fast tier, by bytes.
        rest: Everything else of a layer (attention, norms, router), by tokens.
        outside: What lies outside the layers (embedding, head), by tokens.
        expert_bytes: Of one expert, as it is moved.
        issue: What asking for fetches keeps the fast device from its work, by experts asked for.
        begin: What a fetch takes to get under way where no other is, by fetches: waking up who fetches.
        take: What taking over an expert that has come does, by experts: waking up, giving its module the weights.
        from_disk: There is no GPU: the slow tier is the disk, and what runs in place runs on the fast device too.
    """

    fast: PiecewiseLinear
    slow: PiecewiseLinear
    fetch: PiecewiseLinear
    rest: PiecewiseLinear
    outside: PiecewiseLinear
    expert_bytes: int
    issue: PiecewiseLinear = field(default_factory=lambda: PiecewiseLinear([1], [0.0]))
    begin: PiecewiseLinear = field(default_factory=lambda: PiecewiseLinear([1], [0.0]))
    take: PiecewiseLinear = field(default_factory=lambda: PiecewiseLinear([1], [0.0]))
    from_disk: bool = False


def seconds(
    costs: Costs, resident: dict[int, int], fetched: dict[int, int], in_place: dict[int, int], by: Objective
) -> float:
    """Predicted seconds of a layer's experts, given as {expert: tokens}, under an objective.

    `max`: the link works beside the fast device, which runs the resident experts first and a fetched one when it is
    there, heaviest first; beside both works the CPU, if it is not the fast device itself.
    """
    begin = costs.issue(len(fetched)) + sum(costs.fast(tokens) for tokens in resident.values())
    fetch, slow = costs.fetch(costs.expert_bytes), sum(costs.slow(tokens) for tokens in in_place.values())
    if by == "sum":
        return (
            begin
            + slow
            + costs.begin(len(fetched))
            + sum(fetch + costs.take(1) + costs.fast(tokens) for tokens in fetched.values())
        )
    done, arrived = begin + (slow if costs.from_disk else 0.0), costs.issue(len(fetched)) + costs.begin(1)
    for tokens in sorted(fetched.values(), reverse=True):
        arrived += fetch
        done = max(done, arrived) + costs.take(1) + costs.fast(tokens)
    return max(done, slow)


@dataclass
class Predictor:
    """Decides which missing experts run in place; its `decide` is what a policy calls."""

    costs: Costs
    objective: Objective = "max"

    def decide(self, resident: dict[int, int], missing: dict[int, int]) -> list[int]:
        """The missing experts to run in place, given {expert: tokens}: the split with the least predicted time.

        Exact up to `EXACT_UP_TO` missing experts. Beyond, the splits are those that fetch the experts with most
        tokens, however many: a fetch costs the same for all, computing in place grows with the tokens.
        """
        heaviest = sorted(missing, key=lambda expert: (-missing[expert], expert))
        if len(missing) <= EXACT_UP_TO:
            splits = [kept for count in range(len(missing) + 1) for kept in combinations(heaviest, count)]
        else:
            splits = [tuple(heaviest[:count]) for count in range(len(missing) + 1)]

        def price(fetched: tuple[int, ...]) -> float:
            moved = {expert: missing[expert] for expert in fetched}
            left = {expert: missing[expert] for expert in missing if expert not in moved}
            return seconds(self.costs, resident, moved, left, self.objective)

        best = min(splits, key=price)
        return [expert for expert in missing if expert not in best]
