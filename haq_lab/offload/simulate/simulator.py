"""Simulate a trace with a policy on a virtual clock, without weights and without a GPU.

The figures are predictions and are always labelled `simulated.<hardware>.`.

Four resources work in parallel: the fast device, the link, the CPU and the disk. Each does one thing at a time. An
event starts when its resource is free and its inputs are ready. The order of events is the engine's:

1. The layer's attention and router run.
2. Fetches are started, and behind them the prefetch of the next layer's guesses.
3. Resident experts and those in the slow tier run while the link works.
4. Fetched experts run as they arrive.

A wrong guess is cancelled if its read has not begun.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from haq_lab.offload.costs.cost_model import Costs
from haq_lab.offload.policies.policy import Policy, Visit
from haq_lab.offload.policies.prefetch import Prefetch
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import UserError


class Resource:
    """A device or a link that does one thing at a time."""

    def __init__(self) -> None:
        self.free = 0.0
        self.busy = 0.0

    def run(self, seconds: float, ready: float) -> float:
        """Add work of `seconds` that can start at `ready`. Return the time when it is done."""
        self.free = max(self.free, ready) + seconds
        self.busy += seconds
        return self.free

    def cancel(self, seconds: float) -> None:
        """Remove the last work, which has not begun."""
        self.free -= seconds
        self.busy -= seconds


@dataclass
class Timeline:
    """The result of a simulation.

    Attributes:
        prompt_s: Seconds of each prompt.
        token_s: Seconds of each decoded token.
        busy: Share of the time in which each resource worked.
        bytes: Bytes moved into the fast tier.
        guessed: Number of prefetched experts.
        guesses_used: Number of prefetched experts that the next layer chose.
    """

    prompt_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    guessed: int = 0
    guesses_used: int = 0

    def metrics(self, hardware: str) -> dict[str, float]:
        """Return the metrics by their full names. Raises UserError if no decoded token was simulated."""
        if not self.token_s:
            raise UserError("trace: none of the simulated tokens is a decoded one. Simulate more tokens.")
        milliseconds = 1e3 * np.array(self.token_s)
        name = f"simulated.{hardware}"
        metrics = {
            f"{name}.latency.decode_ms_per_token.mean": float(milliseconds.mean()),
            f"{name}.latency.decode_ms_per_token.p95": float(np.percentile(milliseconds, 95)),
            f"{name}.latency.decode_ms_per_token.std": float(milliseconds.std()),
            f"{name}.latency.tokens_per_s": 1e3 / float(milliseconds.mean()),
            f"{name}.offload.bytes_moved": float(self.bytes),
            **{f"{name}.busy.{resource}": share for resource, share in self.busy.items()},
        }
        if self.guessed:
            metrics[f"{name}.offload.prefetch_accuracy"] = self.guesses_used / self.guessed
        return metrics


class Simulator:
    """Runs a policy on a virtual clock.

    Args:
        costs: Costs of the simulated machine.
        policy: The policy, which could also drive an engine.
        prefetch: The prefetch method, or None.
        guesses: Largest number of guesses for a layer.
        spare: Number of spare slots for guesses and for experts that are not kept.
    """

    def __init__(
        self, costs: Costs, policy: Policy, prefetch: Prefetch | None = None, guesses: int = 0, spare: int = 2
    ):
        self.costs, self.policy = costs, policy
        self.prefetch, self.guesses, self.spare = prefetch, guesses, spare
        self.resources = {name: Resource() for name in ("gpu", "link", "cpu", "disk")}
        self.source = self.resources["disk" if costs.from_disk else "link"]
        self.in_place = self.resources["gpu" if costs.from_disk else "cpu"]  # without a GPU, the CPU is the fast device
        self._ahead: dict[int, float] = {}  # arrival times of the next layer's guesses
        self._timeline = Timeline()

    def run(self, trace: Trace, tokens: int | None = None) -> Timeline:
        """Simulate a trace. Prompts are batches, other tokens are decoded one by one.

        The clock starts at 0. The policy keeps its state.

        Args:
            trace: The trace.
            tokens: Number of tokens to simulate. None for all.

        Raises:
            UserError: The trace has another number of layers or experts.
        """
        trace.must_be_of(*self.policy.resident.shape)
        timeline, now = Timeline(), 0.0
        for resource in self.resources.values():
            resource.free = resource.busy = 0.0
        self._timeline, self._ahead = timeline, {}
        starts = set(trace.starts.tolist())
        token, last = 0, min(tokens or trace.tokens, trace.tokens)
        while token < last:
            if token in starts:
                self.policy.begin()
            end = token + 1
            while not trace.decode[token] and end < last and not trace.decode[end] and end not in starts:
                end += 1
            done = self.step(np.asarray(trace.experts[token:end]), now)
            (timeline.token_s if trace.decode[token] else timeline.prompt_s).append(done - now)
            token, now = end, done
        timeline.busy = {name: resource.busy / now for name, resource in self.resources.items()}
        return timeline

    def step(self, experts: NDArray[np.uint8], now: float) -> float:
        """Simulate one forward pass of choices (tokens, layers, k) from time `now`. Return the time when it is done."""
        gpu, costs = self.resources["gpu"], self.costs
        tokens, layers = experts.shape[:2]
        for layer in range(layers):
            counts = np.bincount(experts[:, layer].ravel(), minlength=self.policy.resident.shape[1])
            gpu.run(costs.rest(tokens), now)
            routed = max(gpu.free, self._drop_wrong_guesses(layer, counts, gpu.free))
            visit = self.policy.visit(layer, counts, tokens)
            arrivals = self._guessed(visit, routed)
            fetched = [one for one in visit.missing if one not in visit.in_place and one not in arrivals]
            passing = [one for one in (*arrivals, *fetched) if one not in visit.replaces]
            guesses = self._guesses(layer, experts[:, layer], passing) if layer + 1 < layers else []
            asked = gpu.run(costs.issue(len(fetched) + len(guesses)), routed)
            arrivals |= {expert: self._read(layer, expert, asked) for expert in fetched}
            self._ahead = {expert: self._read(layer + 1, expert, asked) for expert in guesses}
            in_place = [one for one in visit.in_place if one not in arrivals]
            done = [self.in_place.run(costs.slow(int(counts[expert])), routed) for expert in in_place]
            for expert in visit.wanted:
                if expert not in visit.missing:
                    done.append(gpu.run(costs.fast(int(counts[expert])), routed))
            for expert, arrival in arrivals.items():
                done.append(gpu.run(costs.take(1) + costs.fast(int(counts[expert])), arrival))
            now = max(done)
        return gpu.run(costs.outside(tokens), now)

    def _guessed(self, visit: Visit, routed: float) -> dict[int, float]:
        """Return the arrival times of the missing experts that were guessed."""
        arrivals = {one: max(self._ahead[one], routed) for one in visit.missing if one in self._ahead}
        self._timeline.guesses_used += len(arrivals)
        return arrivals

    def _guesses(self, layer: int, chosen: NDArray[np.uint8], passing: list[int]) -> list[int]:
        """Return the experts to prefetch into the spare slots that are free. Each form has its own spare slots."""
        if self.prefetch is None:
            return []
        wanted = self.prefetch.guess(layer, None, torch.from_numpy(chosen.astype(np.int64)), self.guesses)
        forms, guesses = self.policy.forms, []
        taken = Counter(forms[layer, one] for one in passing)
        for one in wanted:
            form = forms[layer + 1, one]
            if not self.policy.resident[layer + 1, one] and taken[form] < self.spare:
                guesses.append(one)
                taken[form] += 1
        self._timeline.guessed += len(guesses)
        return guesses

    def _read(self, layer: int, expert: int, ready: float) -> float:
        size = self.costs.bytes_of(layer, expert)
        self._timeline.bytes += size
        if ready >= self.source.free:
            ready += self.costs.begin(1)
        return self.source.run(self.costs.fetch(size), ready)

    def _drop_wrong_guesses(self, layer: int, counts: NDArray[np.int64], now: float) -> float:
        """Cancel wrong guesses. Return the time until which wrong guesses that are being read delay the engine."""
        busy_until = 0.0
        for expert in reversed([expert for expert in self._ahead if counts[expert] == 0]):
            arrival, size = self._ahead.pop(expert), self.costs.bytes_of(layer, expert)
            fetch = self.costs.fetch(size)
            if arrival - fetch >= now and arrival == self.source.free:
                self.source.cancel(fetch)
                self._timeline.bytes -= size
            elif arrival > now:
                busy_until = max(busy_until, arrival)
        return busy_until
