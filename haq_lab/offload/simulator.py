"""The simulator: a trace under a policy on a virtual clock, with no weights and no GPU. Its figures are predictions
and are always labelled `simulated.<hardware>.`.

Four resources work at the same time, each one thing after another: the fast device, the link, the CPU and the disk.
An event starts when its resource is free and what it needs is there. The order of events is the engine's: the
layer's attention and router, then resident experts while the link fetches the missing ones, then these as they come.
Prefetching is not simulated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from haq_lab.errors import UserError
from haq_lab.offload.costs import Costs
from haq_lab.offload.policy import Policy
from haq_lab.offload.trace import Trace


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


@dataclass
class Timeline:
    """What a simulation found.

    Attributes:
        prompt_s: Seconds of each prompt.
        token_s: Seconds of each decoded token.
        busy: Share of the time that each resource worked.
        bytes: Moved into the fast tier.
    """

    prompt_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)
    bytes: int = 0

    def metrics(self, hardware: str) -> dict[str, float]:
        """By their full names.

        Raises:
            UserError: No token was decoded.
        """
        if not self.token_s:
            raise UserError("trace: none of the tokens simulated is a decoded one; simulate more of them")
        milliseconds = 1e3 * np.array(self.token_s)
        name = f"simulated.{hardware}"
        return {
            f"{name}.latency.decode_ms_per_token.mean": float(milliseconds.mean()),
            f"{name}.latency.decode_ms_per_token.p95": float(np.percentile(milliseconds, 95)),
            f"{name}.latency.decode_ms_per_token.std": float(milliseconds.std()),
            f"{name}.latency.tokens_per_s": 1e3 / float(milliseconds.mean()),
            f"{name}.offload.bytes_moved": float(self.bytes),
            **{f"{name}.busy.{resource}": share for resource, share in self.busy.items()},
        }


class Simulator:
    """Args:
    costs: What everything takes.
    policy: The same object that would drive the engine.
    from_disk: There is no GPU: fetches come off the disk, and what runs in place runs where everything does.
    """

    def __init__(self, costs: Costs, policy: Policy, from_disk: bool = False):
        self.costs, self.policy = costs, policy
        self.resources = {name: Resource() for name in ("gpu", "link", "cpu", "disk")}
        self.source = self.resources["disk" if from_disk else "link"]
        self.in_place = self.resources["gpu" if from_disk else "cpu"]  # with no GPU, the CPU is the fast device
        self.fetched = 0

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
        self.fetched = 0
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
        timeline.bytes = self.fetched * self.costs.expert_bytes
        return timeline

    def step(self, experts: NDArray[np.uint8], now: float) -> float:
        """One forward pass of (tokens, layers, k) choices that starts at `now`; when it is done."""
        gpu, costs = self.resources["gpu"], self.costs
        tokens = len(experts)
        for layer in range(experts.shape[1]):
            counts = np.bincount(experts[:, layer].ravel(), minlength=self.policy.resident.shape[1])
            routed = gpu.run(costs.rest(tokens), now)
            visit = self.policy.visit(layer, counts, tokens)
            arrivals = {}
            for expert in visit.missing:
                if expert not in visit.in_place:
                    arrivals[expert] = self.source.run(costs.fetch(costs.expert_bytes), routed)
                    self.fetched += 1
            done = [self.in_place.run(costs.slow(int(counts[expert])), routed) for expert in visit.in_place]
            for expert in visit.wanted:
                if expert not in visit.missing:
                    done.append(gpu.run(costs.fast(int(counts[expert])), routed))
            for expert, arrival in arrivals.items():
                done.append(gpu.run(costs.fast(int(counts[expert])), arrival))
            now = max(done)
        return gpu.run(costs.outside(tokens), now)
