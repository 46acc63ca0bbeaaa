"""What a running engine's clock tells: the predictor's costs are corrected by it, its predictions held against it.

The engine reports moments of a layer's visit; the seconds between two of them are what something took:

    chosen      the layer has                  -> the rest of a layer, or what lies outside the layers
    decides     what was read ahead in vain is gone, which may have meant waiting
    asks        a fetch is asked for
    issued      all that there are have been   -> what asking kept the engine from; if none was, part of the rest
    begins      one is under way               -> waking up who fetches, if it had nothing to do
    fetched     it is over                     -> the fetch, since it began or the one before it was over
    waits       an expert is not at hand       -> the expert before it
    starts      it is, and runs                -> the expert before it, or taking over what was fetched; for the first
                                                  expert, part of the rest
    computed    the layer's experts are done   -> the last one
    finished    what they left is cleared up   -> part of the experts run in place, if some were
"""

from __future__ import annotations

import time
from collections.abc import Callable

from haq_lab.offload.costs.cost_model import Costs, Objective, seconds


class CostFeedback:
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
        self._finished: float | None = None  # when the layer before was
        self._rest: float | None = None  # of the layer at work, so far
        self._decides = self._issued = self._running = self._waiting = self._computed = self._begun = self._fetched = (
            0.0
        )
        self._run: tuple[bool, int] | None = None
        self._placed: list[tuple[int, float]] = []  # tokens and seconds of the experts run in place

    def on_routing(self, layer: int, tokens: int) -> None:
        """A layer has chosen, for so many tokens."""
        now, decoded = self._clock(), self._decodes
        self._decodes, self._rest = tokens == 1, None
        if layer == 0:
            self._step = [0.0, 0.0]
        if self._decodes and self._finished is not None:
            if layer:
                self._rest = now - self._finished
            elif decoded:
                self.costs.outside.observe(1, max(now - self._finished - self.costs.rest(1), 0.0))

    def on_guesses_dropped(self) -> None:
        """No wrong guess is in the way any more."""
        self._decides = self._clock()

    def predict(self, hits: dict[int, int], fetched: dict[int, int], placed: dict[int, int]) -> None:
        """Experts {number: tokens} are there, will be fetched, and run in place."""
        self._step[0] += seconds(self.costs, hits, fetched, placed, self.objective)

    def on_request(self) -> float:
        """A fetch is asked for; the time, for `begins`."""
        return self._clock()

    def on_requests_sent(self, count: int) -> None:
        """So many fetches have been asked for."""
        self._issued = self._clock()
        took = self._issued - self._decides
        if self._decodes and count:
            self.costs.issue.observe(count, took)
        elif self._rest is not None:
            self._rest += took

    def on_fetch_start(self, asked: float) -> None:
        """A fetch that was `asked` for then begins. As the next one, called by the thread that fetches."""
        self._begun = self._clock()
        if asked < self._fetched:
            self._begun = self._fetched
        elif self._decodes:
            self.costs.begin.observe(1, self._begun - asked)

    def on_fetch_end(self, size: int) -> float:
        """It is over, of so many bytes; the time, for `starts`."""
        self._fetched = self._clock()
        if self._decodes:
            self.costs.fetch.observe(size, self._fetched - self._begun)
        return self._fetched

    def on_wait(self) -> None:
        """The engine wants an expert that is not at hand."""
        self._waiting = self._close()

    def on_expert_start(self, tokens: int, in_place: bool, fetched: float | None = None) -> None:
        """An expert runs for so many tokens, where its weights lie or in the fast tier.

        Args:
            fetched: When its fetch was over, where the engine wanted it before it was at hand.
        """
        self._running, self._run = self._close(), (in_place, tokens)
        if self._decodes and fetched is not None:
            self.costs.take.observe(1, self._running - max(self._waiting, fetched))

    def on_experts_end(self) -> None:
        """The layer's experts are done."""
        self._computed = self._close()

    def on_cleanup_end(self, layer: int) -> None:
        """What they left behind is cleared up."""
        now = self._clock()
        for tokens, took in self._placed:
            self.costs.slow.observe(tokens, took + (now - self._computed) / len(self._placed))
        self._finished = now if self._placed else self._computed
        self._placed = []
        self._step[1] += self._finished - self._decides
        if layer == self._last and self._decodes:
            self.predicted.append(self._step[0])
            self.measured.append(self._step[1])

    def mape(self) -> float:
        """Mean distance of prediction from measurement, as a share of the latter, over the decoded tokens.

        Each was predicted with the costs as they were before it ran. NaN where there was none.
        """
        shares = [abs(told / took - 1) for told, took in zip(self.predicted, self.measured, strict=True)]
        return sum(shares) / len(shares) if shares else float("nan")

    def _close(self) -> float:
        """What ran is over; the time."""
        now = self._clock()
        if self._rest is not None:
            self.costs.rest.observe(1, self._rest + now - self._issued)
            self._rest = None
        if self._run is not None and self._decodes:
            in_place, tokens = self._run
            if in_place:
                self._placed.append((tokens, now - self._running))
            else:
                self.costs.fast.observe(tokens, now - self._running)
        self._run = None
        return now
