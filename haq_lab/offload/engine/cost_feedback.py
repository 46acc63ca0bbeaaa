"""Measure a running engine, correct the predictor's costs, and compare its predictions with the measurements.

The engine reports events. The time between two events of a layer is attributed to one cost:

    event               time since the event before it
    on_routing          the rest of a layer, or the work outside the layers
    on_guesses_dropped  dropping wrong guesses, which may have meant waiting
    on_request          (a fetch is requested)
    on_requests_sent    issuing the fetches; part of the rest if there were none
    on_fetch_start      waking the reading thread, if it was idle
    on_fetch_end        the fetch, from its start or from the end of the fetch before it
    on_wait             the expert that ran before
    on_expert_start     the expert that ran before, or taking over a fetched expert; for the first expert, the rest
    on_experts_end      the last expert
    on_cleanup_end      part of the experts that ran in place, if there were any
"""

from __future__ import annotations

import time
from collections.abc import Callable

from haq_lab.offload.costs.cost_model import Costs, Objective, seconds


class CostFeedback:
    """Corrects a cost model by the times that an engine measures.

    Args:
        costs: Costs to correct. Only decoded tokens correct them, prompts do not.
        objective: Objective of the prediction.
        layers: Number of layers of the model.
        clock: Function that returns seconds.

    Attributes:
        predicted: Predicted seconds of the experts of each decoded token, summed over layers.
        measured: Measured seconds of the experts of each decoded token, summed over layers.
    """

    def __init__(self, costs: Costs, objective: Objective, layers: int, clock: Callable[[], float] = time.perf_counter):
        self.costs, self.objective, self._last_layer, self._clock = costs, objective, layers - 1, clock
        self.predicted: list[float] = []
        self.measured: list[float] = []
        self._token_seconds = [0.0, 0.0]  # predicted and measured, of the current token
        self._decoding = False
        self._finished_at: float | None = None  # end of the layer before
        self._rest: float | None = None  # of the current layer, so far
        self._decided_at = self._issued_at = self._computed_at = 0.0
        self._started_at = self._waiting_since = 0.0
        self._fetch_started_at = self._fetch_ended_at = 0.0
        self._run: tuple[bool, int] | None = None
        self._in_place: list[tuple[int, float]] = []  # tokens and seconds of experts that ran in place

    def on_routing(self, layer: int, tokens: int) -> None:
        """Report that the router of a layer has chosen experts for `tokens` tokens."""
        now, decoded = self._clock(), self._decoding
        self._decoding, self._rest = tokens == 1, None
        if layer == 0:
            self._token_seconds = [0.0, 0.0]
        if self._decoding and self._finished_at is not None:
            if layer:
                self._rest = now - self._finished_at
            elif decoded:
                self.costs.outside.observe(1, max(now - self._finished_at - self.costs.rest(1), 0.0))

    def on_guesses_dropped(self) -> None:
        """Report that the wrong guesses have been dropped."""
        self._decided_at = self._clock()

    def predict(self, hits: dict[int, int], fetched: dict[int, int], in_place: dict[int, int]) -> None:
        """Add the predicted seconds of a layer's experts, given as {expert: tokens}.

        Args:
            hits: Experts in the fast tier.
            fetched: Experts that will be fetched.
            in_place: Experts that will run in place.
        """
        self._token_seconds[0] += seconds(self.costs, hits, fetched, in_place, self.objective)

    def on_request(self) -> float:
        """Report that a fetch is requested. Returns the time, for `on_fetch_start`."""
        return self._clock()

    def on_requests_sent(self, count: int) -> None:
        """Report that all fetches of the layer, `count` of them, have been requested."""
        self._issued_at = self._clock()
        elapsed = self._issued_at - self._decided_at
        if self._decoding and count:
            self.costs.issue.observe(count, elapsed)
        elif self._rest is not None:
            self._rest += elapsed

    def on_fetch_start(self, requested_at: float) -> None:
        """Report that a fetch starts. The reading thread calls this and `on_fetch_end`.

        Args:
            requested_at: Time of its request.
        """
        self._fetch_started_at = self._clock()
        if requested_at < self._fetch_ended_at:
            self._fetch_started_at = self._fetch_ended_at
        elif self._decoding:
            self.costs.begin.observe(1, self._fetch_started_at - requested_at)

    def on_fetch_end(self, size: int) -> float:
        """Report the end of a fetch of `size` bytes. Returns the time, for `on_expert_start`."""
        self._fetch_ended_at = self._clock()
        if self._decoding:
            self.costs.fetch.observe(size, self._fetch_ended_at - self._fetch_started_at)
        return self._fetch_ended_at

    def on_wait(self) -> None:
        """Report that the engine needs an expert that is not loaded yet."""
        self._waiting_since = self._end_expert()

    def on_expert_start(self, tokens: int, in_place: bool, fetched: float | None = None) -> None:
        """Report that an expert starts to run.

        Args:
            tokens: Number of its tokens.
            in_place: Whether it runs in the slow tier.
            fetched: End of its fetch, if the engine had to wait for it.
        """
        self._started_at, self._run = self._end_expert(), (in_place, tokens)
        if self._decoding and fetched is not None:
            self.costs.take.observe(1, self._started_at - max(self._waiting_since, fetched))

    def on_experts_end(self) -> None:
        """Report that the layer's experts have run."""
        self._computed_at = self._end_expert()

    def on_cleanup_end(self, layer: int) -> None:
        """Report that the engine has cleaned up after the layer."""
        now = self._clock()
        for tokens, elapsed in self._in_place:
            self.costs.slow.observe(tokens, elapsed + (now - self._computed_at) / len(self._in_place))
        self._finished_at = now if self._in_place else self._computed_at
        self._in_place = []
        self._token_seconds[1] += self._finished_at - self._decided_at
        if layer == self._last_layer and self._decoding:
            self.predicted.append(self._token_seconds[0])
            self.measured.append(self._token_seconds[1])

    def mape(self) -> float:
        """Return the mean absolute error of the predictions, relative to the measurements.

        Each decoded token was predicted with the costs before its own correction. NaN if there is no decoded token.
        """
        pairs = zip(self.predicted, self.measured, strict=True)
        errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
        return sum(errors) / len(errors) if errors else float("nan")

    def _end_expert(self) -> float:
        """Assign the time since the last expert started to its cost, and return the current time."""
        now = self._clock()
        if self._rest is not None:
            self.costs.rest.observe(1, self._rest + now - self._issued_at)
            self._rest = None
        if self._run is not None and self._decoding:
            in_place, tokens = self._run
            if in_place:
                self._in_place.append((tokens, now - self._started_at))
            else:
                self.costs.fast.observe(tokens, now - self._started_at)
        self._run = None
        return now
