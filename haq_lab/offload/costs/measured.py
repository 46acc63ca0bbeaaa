"""Micro-benchmarks of this machine: what its experts cost to run and to read. The engine's predictor decides by
them, and the simulator is held against the engine with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from haq_lab.models.architectures import Moe
from haq_lab.models.layerwise import LayeredModel
from haq_lab.offload.costs.cost_model import Costs, PiecewiseLinear
from haq_lab.offload.tiers.arena import page_aligned
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import bind, expert_tensors, set_tensor

TOKENS = (1, 4, 16, 64)
REPEATS = 7
READS = 40
UNKNOWN = 1e-4  # seconds of what only a running engine can tell, until it has (`observer.py`)


def measure_costs(
    layer: nn.Module, moe: Moe, slow_tier: SlowTier, model: LayeredModel, streams: Streams | None = None
) -> Costs:
    """The costs of a model's experts here, on its two tiers. Takes about a second.

    Args:
        layer: A decoder layer whose experts are in the slow_tier or in memory.
        streams: Of the device that computes; a CPU's if None.
    """
    streams = streams or Streams()
    experts: Any = layer.get_submodule(moe.experts)
    blob = page_aligned(slow_tier.blob_bytes, streams.device)

    def read(number: int) -> None:
        with streams.copying(streams.mark()):
            slow_tier.read(0, number, blob)
        streams.drain()

    moved = slow_tier.moved_bytes
    fetch = [(moved, _once(partial(read, index % len(experts)))) for index in range(READS)]
    held = {name: tensor.detach() for name, tensor in expert_tensors(experts[0]).items()}
    read(0)
    fast, slow = [], []
    for tokens in TOKENS:
        hidden = torch.randn(tokens, model.config.hidden_size).to(streams.device)
        chosen = torch.zeros(tokens, 1, dtype=torch.long, device=streams.device)
        run = partial(experts, hidden, chosen, torch.ones(tokens, 1, device=streams.device))
        bind(experts[0], slow_tier.parts, blob)
        run()
        for _ in range(REPEATS):
            begin = streams.mark()
            run()
            fast.append((tokens, streams.seconds(begin, streams.mark())))

        def in_place(run: Callable[[], Any] = run) -> None:
            expert = slow_tier.use_in_place(0, 0, experts[0])
            with _taken_for(experts, expert, streams.separate_memory):
                run()

        for _ in range(3):
            slow_tier.end_use([])
            slow.append((tokens, _once(in_place)))
    for name, tensor in held.items():
        set_tensor(experts[0], name, tensor)
    rest, outside, issue, begin, take = (PiecewiseLinear([1], [UNKNOWN]) for _ in range(5))
    fast_curve, slow_curve, fetch_curve = (PiecewiseLinear.fitted(samples) for samples in (fast, slow, fetch))
    first = fast_curve, slow_curve, fetch_curve, rest, outside
    return Costs(*first, moved, issue, begin, take, from_disk=not streams.separate_memory)


@contextmanager
def _taken_for(experts: Any, expert: nn.Module, beside: bool) -> Iterator[None]:
    """Within the block, whichever expert is asked for is this one, on the host beside a GPU where `beside`."""
    experts.expert, experts.beside = lambda number: expert, beside
    try:
        yield
    finally:
        del experts.expert
        experts.beside = False


def _once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
