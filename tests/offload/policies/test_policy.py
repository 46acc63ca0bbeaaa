"""What every policy keeps to: its slots, its clock, Belady's bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.offload.policies.path_model import HORIZONS, PathModel, fit_path_model
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.routing.statistics import frequencies
from haq_lab.utils.errors import UserError


def plain_model(trace) -> PathModel:
    """A path model written by hand, as fitting one takes a moment: lately used and frequent experts come again."""
    usage = frequencies(trace).astype(np.float32)
    size, features = usage.size, len(HORIZONS) + 1
    recency = np.tile(np.linspace(0.5, -0.5, features, dtype=np.float32), (2, 1))
    path = np.zeros((size, 2, size), np.float32)
    return PathModel(usage, recency, np.stack([usage, usage]), path)


@pytest.mark.parametrize("rule", ["lru", "lfu", "moe_infinity", "haq"])
def test_a_trace_in_two_parts_is_the_trace(make_trace, rule):
    """Time goes on from one replay to the next: an expert's last use never lies in the future."""
    trace = make_trace(tokens=400, sequences=4)
    resident, model = place("frequency", trace, 12), fit_path_model(trace, steps=20)
    once, twice = (make_policy(rule, resident, trace, path_model=model) for _ in range(2))
    whole = once.replay(trace)
    parts = [twice.replay(trace.part(part)) for part in (slice(0, 3), slice(3, 4))]
    assert sum(part.fetched for part in parts) == whole.fetched
    np.testing.assert_array_equal(once.resident, twice.resident)


def test_a_trace_of_another_model_is_refused(make_trace):
    """Compiled code checks no bounds: a larger trace would read and write past the residency map."""
    policy = make_policy("lru", place("uniform", make_trace(), 8), make_trace())
    for other in (make_trace(layers=5), make_trace(experts=9)):
        with pytest.raises(UserError, match="4 layers with 8 experts are needed"):
            policy.replay(other)


def test_lfu_breaks_ties_by_last_use_after_a_million_uses(make_trace):
    resident = np.array([[True, True, False, False]])
    policy = make_policy("lfu", resident, make_trace(layers=1, experts=4))
    for expert in (1, 0):
        policy.visit(0, 2**20 * np.eye(4, dtype=np.int64)[expert], 2**20)
    assert policy.visit(0, np.eye(4, dtype=np.int64)[2], 1).replaces == {2: (0, 1)}


@given(seed=st.integers(0, 1000), rule=st.sampled_from(["lru", "lfu", "moe_infinity", "haq", "none"]))
def test_belady_bounds_every_rule_at_every_budget(make_trace, seed, rule):
    trace = make_trace(tokens=60, layers=3, experts=5, seed=seed)
    model = plain_model(trace)
    for slots in range(3, 16):
        resident = place("uniform", trace, slots)
        bound = make_policy("belady", resident, trace).replay(trace).pairs
        assert make_policy(rule, resident, trace, path_model=model).replay(trace).pairs <= bound + 1e-9


@given(seed=st.integers(0, 1000), scope=st.sampled_from(["layer", "global"]))
def test_lru_never_loses_by_a_larger_budget(make_trace, seed, scope):
    """A stack algorithm: what fewer slots hold, more slots hold too. (Choices of one expert: no visit bypasses.)"""
    trace = make_trace(tokens=100, layers=2, experts=6, k=1, seed=seed)
    usage = np.argsort(np.argsort(-frequencies(trace), -1, kind="stable"), -1)  # (layers, E) rank within the layer
    hits = [make_policy("lru", usage < slots, trace, scope).replay(trace).by_layer.sum() for slots in range(1, 7)]
    assert (np.diff(hits) >= -1e-9).all()
    assert hits[-1] == 2


@given(seed=st.integers(0, 1000), rule=st.sampled_from(["lru", "lfu", "moe_infinity", "haq"]))
def test_a_visit_keeps_slots_and_wants(make_trace, seed, rule):
    """Slots are neither lost nor won; by layer, each layer's are its own; what was just wanted never leaves."""
    trace = make_trace(tokens=40, layers=3, experts=6, seed=seed)
    policy = make_policy(rule, place("uniform", trace, 9), trace, "layer", plain_model(trace))
    for chosen in trace.experts:
        for layer in range(3):
            visit = policy.visit(layer, np.bincount(chosen[layer], minlength=6), 1)
            assert policy.resident.sum(1).tolist() == [3, 3, 3]
            assert not {(layer, wanted) for wanted in visit.wanted} & set(visit.replaces.values())
            assert set(visit.replaces) <= set(visit.missing) <= set(visit.wanted)


def test_experts_run_in_place_are_not_admitted(make_trace):
    trace = make_trace(layers=1)
    policy = make_policy("lru", place("uniform", trace, 4), trace)
    policy.decide = lambda resident, missing: list(missing)[:1]
    missing = np.flatnonzero(~policy.resident[0])[:2]
    visit = policy.visit(0, np.bincount(missing, minlength=8), 1)
    assert visit.in_place == visit.missing[:1]
    assert list(visit.replaces) == visit.missing[1:]
