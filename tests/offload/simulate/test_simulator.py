"""The virtual clock: never back, never ahead of what a resource can do, and 0 again for another run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.offload.costs.cost_model import Costs, PiecewiseLinear, Predictor
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.offload.policies.prefetch import NextOnPath, Remembered
from haq_lab.offload.simulate.simulator import Resource, Simulator
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import UserError

seconds = st.floats(0, 100, allow_nan=False)


def costs_of(fast, slow, fetch, rest=1.0, outside=1.0, disk=False) -> Costs:
    def flat(value):
        return PiecewiseLinear([1], [value])

    return Costs(flat(fast), flat(slow), flat(fetch), flat(rest), flat(outside), expert_bytes=7, from_disk=disk)


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
    seed=st.integers(0, 1000),
    slots=st.integers(4, 31),
    fast=seconds,
    slow=seconds,
    fetch=seconds,
    disk=st.booleans(),
    guesses=st.integers(0, 2),
)
def test_time_is_at_least_each_resources_work(make_trace, seed, slots, fast, slow, fetch, disk, guesses):
    trace = make_trace(tokens=30, seed=seed, prompt=3)
    costs = costs_of(fast, slow, fetch, disk=disk)
    policy = make_policy("lru", place("uniform", trace, slots), trace)
    policy.decide = Predictor(costs).decide
    simulator = Simulator(costs, policy, NextOnPath(trace) if guesses else None, guesses)
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
    with pytest.raises(UserError, match="none of the simulated tokens is a decoded one"):
        simulator.run(trace, tokens=5).metrics("test")
    with pytest.raises(UserError, match="4 layers with 8 experts are needed"):
        simulator.run(make_trace(layers=3))


def two_layers(chosen) -> Trace:
    """One decoded token of two layers of four experts."""
    experts = np.array([chosen], np.uint8)
    return Trace(experts, np.ones(experts.shape, np.float16), np.ones(1, bool), np.zeros(1, np.int64), 4)


@pytest.mark.parametrize("guesses", [[2, 3], [3, 2], [], [3]])
def test_a_guess_hides_a_fetch_and_a_wrong_one_costs_one(guesses):
    """A second for all but a fetch, which takes 10; asking for some takes 0.5, beginning 0.125, taking one over 0.25.

    Layer 1 lacks expert 2, and has chosen at 4, or at 4.5 where layer 0 asked for guesses.
    """
    trace = two_layers([[0, 1], [2, 0]])
    resident = np.array([[True] * 4, [True, True, False, False]])
    more = {"issue": 0.5, "begin": 0.125, "take": 0.25}
    costs = replace(costs_of(1.0, 50.0, 10.0), **{name: PiecewiseLinear([1], [each]) for name, each in more.items()})
    policy = make_policy("none", resident, trace)
    timeline = Simulator(costs, policy, Remembered([[guesses, []]]), len(guesses)).run(trace)
    expected = {
        (2, 3): 1.625 + 10 + 1.25 + 1,  # right, and the wrong one behind it called off: the guess arrives at 11.625
        (3, 2): 1.625 + 20 + 1.25 + 1,  # the wrong one is read first
        (): 4.625 + 10 + 1.25 + 1,
        (3,): 1.625 + 10 + 0.625 + 10 + 1.25 + 1,  # waited for, then the right one is asked for and read
    }
    assert timeline.token_s == [expected[tuple(guesses)]]
    assert timeline.guessed == len(guesses)
    assert timeline.guesses_used == (2 in guesses)
    assert timeline.bytes == 7 * len({2, *guesses} - ({3} if guesses == [2, 3] else set()))


def test_each_expert_moves_its_own_bytes():
    """One second a byte. Layer 0 has chosen at 1 and lacks an expert of 3 bytes, layer 1 at 6 and one of 8."""
    trace = two_layers([[0, 1], [2, 0]])
    resident = np.array([[False, True, False, False], [True, False, False, False]])
    by_bytes = {"fetch": PiecewiseLinear([0, 10], [0.0, 10.0]), "sizes": np.array([[3, 5, 7, 9], [4, 6, 8, 2]])}
    costs = replace(costs_of(1.0, 50.0, 0.0), **by_bytes)
    timeline = Simulator(costs, make_policy("none", resident, trace)).run(trace)
    assert timeline.token_s == [1 + 3 + 1 + 1 + 8 + 1 + 1]
    assert timeline.bytes == 3 + 8


@pytest.mark.parametrize(("forms", "guessed"), [([0, 0, 0, 0], 1), ([0, 0, 0, 1], 2)])
def test_each_form_has_its_own_spare_slots(forms, guessed):
    trace = two_layers([[0, 1], [2, 3]])
    resident = np.array([[True] * 4, [True, True, False, False]])
    policy = make_policy("none", resident, trace, forms=np.array([forms, forms]))
    simulator = Simulator(costs_of(1.0, 5.0, 1.0), policy, Remembered([[[3, 2], []]]), guesses=2, spare=1)
    assert simulator.run(trace).guessed == guessed
