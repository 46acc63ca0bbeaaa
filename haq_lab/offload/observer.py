"""What a running engine's clock tells: the predictor's costs are corrected by it, its predictions held against it.

The engine reports moments of a layer's visit; the seconds between two of them are what something took:

    routed      the layer has chosen      -> the rest of a layer, or what lies outside the layers
    issued      its fetches are under way -> what issuing them kept the engine from
    starts      an expert's weights are there, it runs -> the expert before it
    finished    the layer's experts are done           -> the last one
"""

from __future__ import annotations

import time
from collections.abc import Callable

from haq_lab.offload.costs import Costs, Objective, seconds


class Observer:
    """Args:
    costs: Corrected by every measurement of a decoded token.
    objective: By which a visit's experts are predicted.
    layers: Of the model.
    clock: Seconds.

    Attributes:
        predicted, measured: Seconds that the experts of each decoded token took, all layers together.
    """

    def __init__(self, costs: Costs, objective: Objective, layers: int, clock: Callable[[], float] = time.perf_counter):
        self.costs, self.objective, self._last, self._clock = costs, objective, layers - 1, clock
        self.predicted: list[float] = []
        self.measured: list[float] = []
        self._step = [0.0, 0.0]  # predicted and measured, of the token at work
        self._decodes = False
        self._done: float | None = None  # when the layer before was
        self._routed = self._running = 0.0
        self._run: tuple[bool, int] | None = None

    def routed(
        self, layer: int, tokens: int, hits: dict[int, int], fetched: dict[int, int], placed: dict[int, int]
    ) -> None:
        """A layer has chosen, for so many tokens: experts {number: tokens} there, to be fetched, and run in place."""
        self._routed = self._clock()
        decoded, self._decodes = self._decodes, tokens == 1
        if self._decodes and self._done is not None and (layer or decoded):
            since = self._routed - self._done
            if layer:
                self.costs.rest.observe(1, since)
            else:
                self.costs.outside.observe(1, max(since - self.costs.rest(1), 0.0))
        if layer == 0:
            self._step = [0.0, 0.0]
        self._step[0] += seconds(self.costs, hits, fetched, placed, self.objective)

    def issued(self, count: int) -> None:
        """So many fetches have been issued."""
        if self._decodes and count:
            self.costs.issue.observe(count, self._clock() - self._routed)

    def fetched(self, size: int, took: float) -> None:
        """A fetch of so many bytes is over; called by the thread that read them."""
        self.costs.fetch.observe(size, took)

    def starts(self, tokens: int, in_place: bool) -> None:
        """An expert runs for so many tokens, where its weights lie or in the fast tier."""
        self._close()
        self._run, self._running = (in_place, tokens), self._clock()

    def waits(self) -> None:
        """The engine waits for an expert: what ran before is over."""
        self._close()

    def finished(self, layer: int) -> None:
        """The layer's experts are done."""
        self._close()
        self._done = self._clock()
        self._step[1] += self._done - self._routed
        if layer == self._last and self._decodes:
            self.predicted.append(self._step[0])
            self.measured.append(self._step[1])

    def mape(self) -> float:
        """Mean distance of prediction from measurement, as a share of the latter, over the decoded tokens.

        Each was predicted with the costs as they were before it ran. NaN where there was none.
        """
        shares = [abs(told / took - 1) for told, took in zip(self.predicted, self.measured, strict=True)]
        return sum(shares) / len(shares) if shares else float("nan")

    def _close(self) -> None:
        if self._run is None:
            return
        in_place, tokens = self._run
        (self.costs.slow if in_place else self.costs.fast).observe(tokens, self._clock() - self._running)
        self._run = None
