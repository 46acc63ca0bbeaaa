"""The compiled rule against the definition, written down in plain float64: p, h, the two costs, and who leaves."""

from __future__ import annotations

import numpy as np
import pytest

from haq_lab.offload.policies import eviction as cache
from haq_lab.offload.policies.haq import _exp_minus, _log_odds, haq_eviction
from haq_lab.offload.policies.path_model import HORIZONS, MAX_AGE, PathModel, log_odds
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.routing.statistics import frequencies


def model_for(trace, seed=0) -> PathModel:
    """Numbers of the size that fitting gives, chosen at random."""
    rng = np.random.default_rng(seed)
    usage = frequencies(trace).astype(np.float32)
    recency = rng.normal(0.3, 0.3, (2, len(HORIZONS) + 1)).astype(np.float32)
    bias = rng.normal(-1, 0.5, (2, *usage.shape)).astype(np.float32)
    path = rng.normal(0, 0.5, (usage.size, 2, usage.size)).astype(np.float32)
    return PathModel(usage, recency, bias, path)


class Plain:
    """The rule as its module's text has it."""

    def __init__(self, model: PathModel):
        self.model, shape = model, model.usage.shape
        self.average = np.repeat(model.usage[:, :, None].astype(float), len(HORIZONS), 2)
        self.last = np.full(shape, -MAX_AGE)
        self.seen = np.full(shape[0], -1)  # the token of a layer's latest visit
        self.known, self.coming = np.zeros((2, *shape)), np.zeros((2, *shape))

    def touch(self, layer, counts, tokens, now):
        layers, count = self.model.usage.shape
        shares = counts / tokens
        self.average[layer] += (shares[:, None] - self.average[layer]) / HORIZONS
        self.last[layer, counts > 0] = now
        self.seen[layer] = now
        if layer == 0:
            self.coming = np.zeros_like(self.coming)
        path = self.model.path.reshape(layers, count, 2, layers, count)[layer]
        self.coming = self.coming + np.einsum("e,ehlf->hlf", shares, path)
        if layer == layers - 1:
            self.known = self.coming

    def costs(self, layer):
        layers = len(self.model.usage)
        age = np.minimum(np.maximum(self.seen[:, None], 0) + 1 - self.last, MAX_AGE)
        features = np.concatenate([log_odds.py_func(self.average), np.log(1 + age)[..., None]], -1)
        logits = np.einsum("lef,hf->hle", features, self.model.recency) + self.model.bias
        passed = np.arange(layers)[:, None] <= layer
        path = np.where(passed, self.coming, self.known if layer < layers - 1 else self.coming)
        p, h = 1 / (1 + np.exp(-np.clip(logits + path, -10, 10)))
        distance = np.where(passed, layers, 0) + np.arange(layers)[:, None] - layer
        return np.minimum(distance / p, distance + layers * (1 - p) / h)


@pytest.mark.parametrize(("experts", "k", "prompt"), [(8, 2, 1), (7, 3, 1), (20, 1, 1), (8, 2, 5)])
def test_costs_are_the_definitions(make_trace, experts, k, prompt):
    """Also after a prompt, once a whole token has been decoded."""
    trace = make_trace(tokens=40, layers=3, experts=experts, k=k)
    model = model_for(trace)
    state, plain = haq_eviction(model), Plain(model)
    resident = place("uniform", trace, 3 * k)
    switches = False, True, np.ones(experts, bool), np.zeros(experts, np.int64)
    for start in (0, *range(prompt, 40)):
        step = trace.experts[: prompt if start == 0 else start + 1][start:]
        now = start + len(step) - 1
        for layer in range(3):
            counts = np.bincount(step[:, layer].ravel(), minlength=experts)
            wanted = np.flatnonzero(counts)
            missed = not resident[layer, wanted].all()
            cache.visit(state, resident, layer, wanted, counts, len(step), now, *switches)
            plain.touch(layer, counts, len(step), now)
            if missed and (prompt == 1 or start > prompt):
                np.testing.assert_allclose(state.cost.reshape(3, experts), plain.costs(layer), rtol=5e-3)
    np.testing.assert_array_equal(np.argsort(state.values.ravel()), np.argsort(-state.cost))


def test_who_leaves_is_the_one_that_promises_least(make_trace):
    trace = make_trace(tokens=60, layers=4)
    policy = make_policy("haq", place("uniform", trace, 12), trace, path_model=model_for(trace))
    left = 0
    for chosen in trace.experts:
        for layer in range(4):
            before = policy.resident.copy()
            visit = policy.visit(layer, np.bincount(chosen[layer], minlength=8), 1)
            before[layer, visit.wanted] = False
            if len(visit.replaces) == 1:
                (gone,) = visit.replaces.values()
                cost = policy.state.cost.reshape(before.shape)
                assert cost[gone] == cost[before].max()
                left += 1
    assert left > 20


def test_the_functions_without_logarithm_and_exponential():
    share = np.linspace(0, 1, 401, dtype=np.float32)
    ours = [_log_odds(np.float32(each)) for each in share]
    np.testing.assert_allclose(ours, log_odds.py_func(share.astype(float)), atol=2e-5)
    for z in np.linspace(-10, 10, 201):
        assert _exp_minus(np.float32(z)) == pytest.approx(np.exp(-z), rel=2e-3)
    assert _exp_minus(np.float32(50)) == _exp_minus(np.float32(10))
