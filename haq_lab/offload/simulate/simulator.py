"""The simulator: a trace under a policy on a virtual clock, with no weights and no GPU. Its figures are predictions
and are always labelled `simulated.<hardware>.`.

Four resources work at the same time, each one thing after another: the fast device, the link, the CPU and the disk.
An event starts when its resource is free and what it needs is there. The order of events is the engine's: the
layer's attention and router; fetches are asked for, guesses of the next layer behind them; resident experts and those
in place run while the link works, then the fetched ones as they come. A wrong guess whose read has not begun is called
off.
"""

from __future__ import annotations

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
    """Something that does one thing at a time."""

    def __init__(self) -> None:
        self.free = 0.0
        self.busy = 0.0

    def run(self, seconds: float, ready: float) -> float:
        """Do something that takes `seconds` and can start at `ready`; when it is done."""
        self.free = max(self.free, ready) + seconds
        self.busy += seconds
        return self.free

    def call_off(self, seconds: float) -> None:
        """The last thing, which has not begun, is not done after all."""
        self.free -= seconds
        self.busy -= seconds


@dataclass
class Timeline:
    """What a simulation found.

    Attributes:
        prompt_s: Seconds of each prompt.
        token_s: Seconds of each decoded token.
        busy: Share of the time that each resource worked.
        bytes: Moved into the fast tier.
        guessed, guesses_used: Experts read ahead, and those of them that were wanted.
    """

    prompt_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    guessed: int = 0
    guesses_used: int = 0

    def metrics(self, hardware: str) -> dict[str, float]:
        """Metrics by their full names. Raises `UserError` where no decoded token was simulated."""
        if not self.token_s:
            raise UserError("trace: none of the tokens simulated is a decoded one; simulate more of them")
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
    """Args:
    costs: What everything takes.
    policy: The same object that would drive the engine.
    prefetch, guesses, spare: The engine's (`engine.py`).
    """

    def __init__(
        self, costs: Costs, policy: Policy, prefetch: Prefetch | None = None, guesses: int = 0, spare: int = 2
    ):
        self.costs, self.policy = costs, policy
        self.prefetch, self.guesses, self.spare = prefetch, guesses, spare
        self.resources = {name: Resource() for name in ("gpu", "link", "cpu", "disk")}
        self.source = self.resources["disk" if costs.from_disk else "link"]
        self.in_place = self.resources["gpu" if costs.from_disk else "cpu"]  # with no GPU, the CPU is the fast device
        self._ahead: dict[int, float] = {}  # guesses of the coming layer: when they have arrived
        self._timeline = Timeline()
        self._fetched = 0

    def run(self, trace: Trace, tokens: int | None = None) -> Timeline:
        """The first `tokens` tokens of a trace: prompts as batches, the others one by one.

        The clock begins at 0; what the policy has learnt stays.

        Raises:
            UserError: The trace is of another number of layers or experts.
        """
        trace.must_be_of(*self.policy.resident.shape)
        timeline, now = Timeline(), 0.0
        for resource in self.resources.values():
            resource.free = resource.busy = 0.0
        self._timeline, self._fetched, self._ahead = timeline, 0, {}
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
        timeline.bytes = self._fetched * self.costs.expert_bytes
        return timeline

    def step(self, experts: NDArray[np.uint8], now: float) -> float:
        """One forward pass of (tokens, layers, k) choices that starts at `now`; when it is done."""
        gpu, costs = self.resources["gpu"], self.costs
        tokens, layers = experts.shape[:2]
        for layer in range(layers):
            counts = np.bincount(experts[:, layer].ravel(), minlength=self.policy.resident.shape[1])
            gpu.run(costs.rest(tokens), now)
            routed = max(gpu.free, self._drop_wrong_guesses(counts, gpu.free))
            visit = self.policy.visit(layer, counts, tokens)
            arrivals = self._guessed(visit, routed)
            fetched = [one for one in visit.missing if one not in visit.in_place and one not in arrivals]
            passing = [one for one in (*arrivals, *fetched) if one not in visit.replaces]
            guesses = self._guesses(layer, experts[:, layer], len(passing)) if layer + 1 < layers else []
            asked = gpu.run(costs.issue(len(fetched) + len(guesses)), routed)
            arrivals |= {expert: self._read(asked) for expert in fetched}
            self._ahead = {expert: self._read(asked) for expert in guesses}
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
        """Missing experts that were guessed: when they are there."""
        arrivals = {one: max(self._ahead[one], routed) for one in visit.missing if one in self._ahead}
        self._timeline.guesses_used += len(arrivals)
        return arrivals

    def _guesses(self, layer: int, chosen: NDArray[np.uint8], passing: int) -> list[int]:
        """What to read ahead into the spare slots that no expert passes through."""
        if self.prefetch is None:
            return []
        wanted = self.prefetch.guess(layer, None, torch.from_numpy(chosen.astype(np.int64)), self.guesses)
        guesses = [one for one in wanted if not self.policy.resident[layer + 1, one]][: max(self.spare - passing, 0)]
        self._timeline.guessed += len(guesses)
        return guesses

    def _read(self, ready: float) -> float:
        self._fetched += 1
        if ready >= self.source.free:
            ready += self.costs.begin(1)
        return self.source.run(self.costs.fetch(self.costs.expert_bytes), ready)

    def _drop_wrong_guesses(self, counts: NDArray[np.int64], now: float) -> float:
        """Until when wrong guesses keep the engine waiting: those that are being read."""
        busy_until = 0.0
        fetch = self.costs.fetch(self.costs.expert_bytes)
        for expert in reversed([expert for expert in self._ahead if counts[expert] == 0]):
            arrival = self._ahead.pop(expert)
            if arrival - fetch >= now and arrival == self.source.free:
                self.source.call_off(fetch)
                self._fetched -= 1
            elif arrival > now:
                busy_until = max(busy_until, arrival)
        return busy_until
