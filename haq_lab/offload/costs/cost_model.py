"""Predict what it costs to run an expert in either tier or to fetch it, and decide where each missing expert runs.

Costs are piecewise linear. They are fitted to micro-benchmarks (`measured.py`) or derived from a machine's
specification (`from_spec.py`). A running engine corrects them by its measurements (`engine/cost_feedback.py`). The
objective is one of two. `sum` adds all costs, as the code of Fiddler does. `max` takes the time until the fast device,
the link and the CPU are all done, because they work at the same time (arXiv 2402.07033).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Objective = Literal["sum", "max"]
EXACT_UP_TO = 12  # missing experts up to which every split is tried
MEMORY = 0.998  # least weight of the old correction in a moving average


@dataclass
class PiecewiseLinear:
    """Seconds as a piecewise linear function of a size. Beyond the last point the last line continues.

    Attributes:
        sizes: Sizes of the points, ascending.
        seconds: Seconds at these sizes.
        correction: Factor that the curve is multiplied by. `observe` changes it.
        observed: Number of measurements so far.
    """

    sizes: Sequence[float]
    seconds: Sequence[float]
    correction: float = field(default=1.0)
    observed: int = field(default=0)

    def __call__(self, size: float) -> float:
        """Return the seconds for a size, and 0 for sizes up to 0."""
        if size <= 0:
            return 0.0
        return self.correction * self._curve(size)

    def _curve(self, size: float) -> float:
        if size <= self.sizes[-1] or len(self.sizes) == 1:
            return float(np.interp(size, self.sizes, self.seconds))
        (x0, x1), (y0, y1) = self.sizes[-2:], self.seconds[-2:]
        return float(y1 + (y1 - y0) / (x1 - x0) * (size - x1))

    def observe(self, size: float, seconds: float) -> None:
        """Correct the curve by a measurement.

        The correction is the mean ratio of all measurements, and an exponential moving average once there are many. A
        curve that predicts 0 seconds is not corrected.

        Args:
            size: Size that was measured.
            seconds: Measured seconds.
        """
        if predicted := self._curve(size):
            self.observed += 1
            weight = max(1 / self.observed, 1 - MEMORY)
            self.correction += weight * (seconds / predicted - self.correction)

    @classmethod
    def fitted(cls, samples: Sequence[tuple[float, float]]) -> PiecewiseLinear:
        """Fit a non-decreasing curve through the median at each size.

        Args:
            samples: (size, seconds) pairs.
        """
        sizes = sorted({size for size, _ in samples})
        medians = [float(np.median([seconds for at, seconds in samples if at == size])) for size in sizes]
        return cls(sizes, np.maximum.accumulate(medians).tolist())


@dataclass
class Costs:
    """Seconds of all the work that a layer's experts can need.

    Attributes:
        fast: One expert on the fast device, by tokens.
        slow: One expert in the slow tier, by tokens.
        fetch: Moving one expert to the fast tier, by bytes.
        rest: The other parts of a layer (attention, norms, router), by tokens.
        outside: The parts outside the layers (embedding, head), by tokens.
        expert_bytes: Bytes that are moved for one expert. If experts differ in size, those of an expert of mean size.
        issue: Requesting fetches, which delays the fast device, by number of fetches.
        begin: Waking the reading thread if it is idle, by number of fetches.
        take: Taking over fetched experts (waking up, binding the weights), by number of experts.
        from_disk: Whether the slow tier is a disk, so there is no GPU and experts in place run on the fast device too.
        sizes: (layers, E) bytes that are moved for each expert, or None if all have `expert_bytes`.
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
    sizes: NDArray[np.int64] | None = None

    def bytes_of(self, layer: int, expert: int) -> int:
        """Return the bytes that are moved for an expert."""
        return self.expert_bytes if self.sizes is None else int(self.sizes[layer, expert])


def seconds(
    costs: Costs, resident: dict[int, int], fetched: dict[int, int], in_place: dict[int, int], by: Objective
) -> float:
    """Predict the seconds of a layer's experts, given as {expert: tokens}.

    With the objective `max`, the link fetches while the fast device computes. The fast device runs the resident experts
    first, then each fetched expert when it has arrived, the one with most tokens first. The CPU works at the same time,
    unless it is the fast device.

    All experts count as experts of mean size. Fetching an expert and computing it in place both take time in proportion
    to its bytes, so a choice between the two hardly depends on them.

    Args:
        costs: Costs of the machine.
        resident: Experts in the fast tier.
        fetched: Experts to fetch.
        in_place: Experts that run in the slow tier.
        by: Objective.
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
    """Decides which missing experts run in place. A policy calls its `decide`.

    Attributes:
        costs: Costs of the machine. They may be corrected while it is in use.
        objective: Objective to minimise.
    """

    costs: Costs
    objective: Objective = "max"

    def decide(self, resident: dict[int, int], missing: dict[int, int]) -> list[int]:
        """Choose the missing experts that run in place, so that the predicted time is minimal.

        The search is exhaustive for up to `EXACT_UP_TO` missing experts. Beyond that it only considers fetching the n
        experts with most tokens, for every n. This is a good choice because fetching costs the same for all experts,
        and computing in place grows with the tokens.

        Args:
            resident: {expert: tokens} of the experts in the fast tier.
            missing: {expert: tokens} of the missing experts.

        Returns:
            The missing experts to run in place. The others are to be fetched.
        """
        heaviest = sorted(missing, key=lambda expert: (-missing[expert], expert))
        if len(missing) <= EXACT_UP_TO:
            splits = [split for count in range(len(missing) + 1) for split in combinations(heaviest, count)]
        else:
            splits = [tuple(heaviest[:count]) for count in range(len(missing) + 1)]

        def predicted_seconds(fetched: tuple[int, ...]) -> float:
            moved = {expert: missing[expert] for expert in fetched}
            left = {expert: missing[expert] for expert in missing if expert not in moved}
            return seconds(self.costs, resident, moved, left, self.objective)

        best = min(splits, key=predicted_seconds)
        return [expert for expert in missing if expert not in best]
