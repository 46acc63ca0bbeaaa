"""Traces with memory from token to token, small enough to check by hand or by exhaustive search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.routing.trace import Trace

MakeTrace = Callable[..., Trace]


@pytest.fixture(scope="module")
def model() -> LayeredModel:
    """Two layers of eight experts, a module's own."""
    torch.set_num_threads(1)
    return LayeredModel(TinyModel("mixtral", layers=2).folder())


@pytest.fixture(scope="session")
def make_trace() -> MakeTrace:
    """Traces (tokens, layers, k) whose tokens are of a few kinds; a kind prefers its own experts at every layer."""

    def make(tokens=400, layers=4, experts=8, k=2, kinds=5, seed=0, prompt=0, sequences=2) -> Trace:
        rng = np.random.default_rng(seed)
        taste = rng.gumbel(size=(kinds, layers, experts)) * 1.5
        kind, chosen = 0, []
        for _ in range(tokens):
            kind = (kind + 1) % kinds if rng.random() < 0.6 else rng.integers(kinds)
            scores = taste[kind] + rng.gumbel(size=(layers, experts))
            chosen.append(np.argsort(-scores, -1)[:, :k])
        starts = np.arange(sequences, dtype=np.int64) * (tokens // sequences)
        since = np.arange(tokens) - starts[np.searchsorted(starts, np.arange(tokens), "right") - 1]
        weights = np.full((tokens, layers, k), 1 / k, np.float16)
        return Trace(np.array(chosen, np.uint8), weights, since >= prompt, starts, experts, "made", "up")

    return make
