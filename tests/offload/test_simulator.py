"""The virtual clock: never back, never ahead of what a resource can do, and 0 again for another run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.errors import UserError
from haq_lab.offload.costs import Costs, PiecewiseLinear, Predictor
from haq_lab.offload.placement import place
from haq_lab.offload.policy import make_policy
from haq_lab.offload.simulator import Resource, Simulator

seconds = st.floats(0, 100, allow_nan=False)


def costs_of(fast, slow, fetch, rest=1.0, outside=1.0) -> Costs:
    def flat(value):
        return PiecewiseLinear([1], [value])

    return Costs(flat(fast), flat(slow), flat(fetch), flat(rest), flat(outside), expert_bytes=7)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=20))
def test_a_resource_does_one_thing_after_another(jobs):
    resource, last = Resource(), 0.0
    for duration, ready in jobs:
        done = resource.run(duration, ready)
        assert done >= max(last, ready) + duration - 1e-9
        last = done
    assert resource.busy == pytest.approx(sum(duration for duration, _ in jobs))
    assert last >= resource.busy - 1e-6


@given(
    seed=st.integers(0, 1000), slots=st.integers(4, 31), fast=seconds, slow=seconds, fetch=seconds, disk=st.booleans()
)
def test_time_is_at_least_each_resources_work(make_trace, seed, slots, fast, slow, fetch, disk):
    trace = make_trace(tokens=30, seed=seed, prompt=3)
    costs = costs_of(fast, slow, fetch)
    policy = make_policy("lru", place("uniform", trace, slots), trace)
    policy.decide = Predictor(costs).decide
    simulator = Simulator(costs, policy, disk)
    timeline = simulator.run(trace)
    whole = sum(timeline.prompt_s) + sum(timeline.token_s)
    assert min(timeline.token_s + timeline.prompt_s) >= 4 * 1.0 + 1.0  # attention of four layers, and the head
    assert all(resource.busy <= whole * (1 + 1e-9) for resource in simulator.resources.values())
    assert all(0 <= share <= 1 + 1e-9 for share in timeline.busy.values())
    serial = sum(resource.busy for resource in simulator.resources.values())
    assert whole <= serial * (1 + 1e-9), "something always works"


def test_another_run_begins_at_zero(make_trace):
    """An all-resident model takes as long the second time."""
    trace = make_trace(tokens=20)
    simulator = Simulator(costs_of(1.0, 5.0, 2.0), make_policy("none", place("uniform", trace, 32), trace))
    first, second = simulator.run(trace), simulator.run(trace)
    np.testing.assert_allclose(first.token_s, second.token_s)
    assert first.busy == second.busy
    assert first.bytes == second.bytes == 0


def test_mistakes(make_trace):
    trace = make_trace(tokens=20, prompt=8)
    simulator = Simulator(costs_of(1.0, 5.0, 2.0), make_policy("none", place("uniform", trace, 8), trace))
    with pytest.raises(UserError, match="none of the tokens simulated is a decoded one"):
        simulator.run(trace, tokens=5).metrics("test")
    with pytest.raises(UserError, match="where 4 and 8 are wanted"):
        simulator.run(make_trace(layers=3))
