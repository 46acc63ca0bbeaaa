"""Micro-benchmarks of this machine: what its experts cost to run and to read. The engine's predictor decides by
them, and the simulator is held against the engine with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from haq_lab.models.families import Moe
from haq_lab.models.layered import LayeredModel
from haq_lab.offload.arena import aligned
from haq_lab.offload.costs import Costs, PiecewiseLinear
from haq_lab.offload.store import ExpertStore, bind, put, tensors_of

TOKENS = (1, 4, 16, 64)
REPEATS = 7
READS = 40
UNKNOWN = 1e-4  # seconds of what only a running engine can tell, until it has (`observer.py`)


def measure_costs(layer: nn.Module, moe: Moe, store: ExpertStore, model: LayeredModel) -> Costs:
    """The costs of a model's experts here, on the RAM and disk tiers. Takes about a second.

    Args:
        layer: A decoder layer whose experts are in the store or in memory.
    """
    experts = cast(nn.ModuleList, layer.get_submodule(moe.experts))
    blob = aligned(store.blob_bytes)
    fetch = [(store.blob_bytes, _once(partial(store.read, 0, index % len(experts), blob))) for index in range(READS)]
    held = {name: tensor.detach() for name, tensor in tensors_of(experts[0]).items()}
    store.read(0, 0, blob)
    bind(experts[0], store.parts, blob)
    fast, slow = [], []
    for tokens in TOKENS:
        hidden = torch.randn(tokens, model.config.hidden_size)
        chosen, weights = torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1)
        run = lambda hidden=hidden, chosen=chosen, weights=weights: experts(hidden, chosen, weights)  # noqa: E731
        run()
        fast += [(tokens, _once(run)) for _ in range(REPEATS)]

        def in_place(run: Callable[[], Any] = run) -> None:
            bind(experts[0], store.parts, store.mapped(0, 0))
            run()

        for _ in range(3):
            store.drop_cache()
            slow.append((tokens, _once(in_place)))
        bind(experts[0], store.parts, blob)
    for name, tensor in held.items():
        put(experts[0], name, tensor)
    rest, outside, issue, begin, take = (PiecewiseLinear([1], [UNKNOWN]) for _ in range(5))
    fast_curve, slow_curve, fetch_curve = (PiecewiseLinear.fitted(samples) for samples in (fast, slow, fetch))
    first = fast_curve, slow_curve, fetch_curve, rest, outside
    return Costs(*first, store.blob_bytes, issue, begin, take, from_disk=True)


def _once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
