"""Measure what it costs to run and to fetch experts on this machine.

The predictor uses these costs, and tests compare the simulator with the engine by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from haq_lab.models.families.family import Moe
from haq_lab.models.layerwise import LayeredModel
from haq_lab.offload.costs.cost_model import Costs, PiecewiseLinear
from haq_lab.offload.tiers.arena import page_aligned
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import bind, expert_tensors, set_tensor

TOKENS = (1, 4, 16, 64)
REPEATS = 7
READS = 40
UNKNOWN = 1e-4  # seconds, until a running engine corrects them (`engine/cost_feedback.py`)


def measure_costs(
    layer: nn.Module, moe: Moe, slow_tier: SlowTier, model: LayeredModel, streams: Streams | None = None
) -> Costs:
    """Measure the costs of a model's experts on its two tiers. Takes about a second.

    Args:
        layer: First decoder layer, with its experts in the slow tier or in memory.
        moe: Description of the family's MoE block.
        slow_tier: Slow tier that holds the experts.
        model: The model that the layer belongs to.
        streams: Streams of the device that computes. If None, the CPU computes.

    Returns:
        The costs. Costs that only a running engine can measure are set to `UNKNOWN`.
    """
    streams = streams or Streams()
    experts: Any = layer.get_submodule(moe.experts)
    layouts, moved = slow_tier.layouts, slow_tier.moved_bytes
    arena = page_aligned(layouts.largest, streams.device)

    def read(number: int) -> Tensor:
        blob = arena[: layouts.of(0, number).size]
        with streams.copying(streams.mark()):
            slow_tier.read(0, number, blob)
        streams.drain()
        return blob

    numbers = [index % len(experts) for index in range(READS)]
    fetch = [(float(moved[0, number]), _seconds_of(partial(read, number))) for number in numbers]
    typical = int(np.abs(moved[0] - moved.mean()).argmin())
    expert, parts = experts[typical], layouts.of(0, typical).parts
    own_weights = {name: tensor.detach() for name, tensor in expert_tensors(expert).items()}
    blob = read(typical)
    fast, slow = [], []
    for tokens in TOKENS:
        hidden = torch.randn(tokens, model.config.hidden_size).to(streams.device)
        chosen = torch.full((tokens, 1), typical, device=streams.device)
        run = partial(experts, hidden, chosen, torch.ones(tokens, 1, device=streams.device))
        bind(expert, parts, blob)
        run()
        for _ in range(REPEATS):
            begin = streams.mark()
            run()
            fast.append((tokens, streams.seconds(begin, streams.mark())))

        def in_place(run: Callable[[], Any] = run) -> None:
            in_slow_tier = slow_tier.use_in_place(0, typical, expert)
            with _replaced_by(experts, in_slow_tier, streams.separate_memory):
                run()

        for _ in range(3):
            slow_tier.end_use([])
            slow.append((tokens, _seconds_of(in_place)))
    for name, tensor in own_weights.items():
        set_tensor(expert, name, tensor)
    rest, outside, issue, begin, take = (PiecewiseLinear([1], [UNKNOWN]) for _ in range(5))
    fast_curve, slow_curve, fetch_curve = (PiecewiseLinear.fitted(samples) for samples in (fast, slow, fetch))
    curves = fast_curve, slow_curve, fetch_curve, rest, outside
    from_disk = not streams.separate_memory
    return Costs(*curves, round(moved.mean()), issue, begin, take, from_disk, moved)


@contextmanager
def _replaced_by(experts: Any, expert: nn.Module, beside: bool) -> Iterator[None]:
    """Make `experts` return this expert for every index within the block."""
    experts.expert, experts.beside = lambda number: expert, beside
    try:
        yield
    finally:
        del experts.expert
        experts.beside = False


def _seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
