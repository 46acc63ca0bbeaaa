"""Test with a scripted clock that the time between two events is assigned to the right cost."""

from __future__ import annotations

import math

import pytest

from haq_lab.offload.costs.cost_model import Costs, PiecewiseLinear
from haq_lab.offload.engine.cost_feedback import CostFeedback

NAMES = ("fast", "slow", "fetch", "rest", "outside", "issue", "begin", "take")


def scripted(*readings: float) -> CostFeedback:
    """Return a feedback for two layers. All costs are one second at first."""
    curves = {name: PiecewiseLinear([1], [1.0]) for name in NAMES}
    left = iter(readings)
    return CostFeedback(Costs(**curves, expert_bytes=1), "sum", 2, clock=lambda: next(left))


def visit(feedback: CostFeedback, layer: int, tokens: int = 1) -> None:
    """Run one layer with a resident expert, one in place and one fetched."""
    feedback.on_routing(layer, tokens)
    feedback.on_guesses_dropped()
    feedback.predict({0: tokens}, {1: tokens}, {2: tokens})
    asked = feedback.on_request()
    feedback.on_requests_sent(1)
    feedback.on_expert_start(tokens, in_place=False)
    feedback.on_expert_start(tokens, in_place=True)
    feedback.on_wait()
    feedback.on_fetch_start(asked)
    feedback.on_expert_start(tokens, in_place=False, fetched=feedback.on_fetch_end(1))
    feedback.on_experts_end()
    feedback.on_cleanup_end(layer)


def event_times(begin: float) -> list[float]:
    """Return the times of one layer's events.

    A wrong guess takes 1 s, requesting 2 s, dispatching 1 s, the resident expert 5 s and the one in place 7 s. The
    fetched expert is needed then. Its fetch starts 15 s after the request and takes 4 s, taking over 3 s and running 5
    s. Cleaning up takes 4 s.
    """
    return [begin + after for after in (0, 1, 2, 3, 4, 9, 16, 17, 21, 24, 29, 33)]


def corrections(feedback: CostFeedback) -> dict[str, float]:
    return {name: getattr(feedback.costs, name).correction for name in NAMES}


def test_every_cost_is_the_time_between_two_events():
    feedback = scripted(*event_times(0), *event_times(33 + 12), *event_times(78 + 12 + 40))
    for layer in (0, 1, 0):
        visit(feedback, layer)
    fetching = {"issue": 2, "begin": 15, "fetch": 4, "take": 3}
    assert corrections(feedback) == {"fast": 5, "slow": 7 + 4, "rest": 12 + 1, "outside": 40 - 1, **fetching}


def test_without_fetches_and_experts_in_place_deciding_and_cleaning_up_are_part_of_the_rest():
    feedback = scripted(0, 0, 1, 2, 9, 10, 15, 18, 20, 23)
    for layer in range(2):
        feedback.on_routing(layer, 1)
        feedback.on_guesses_dropped()
        feedback.on_requests_sent(0)
        feedback.on_expert_start(1, in_place=False)
        if layer == 0:
            feedback.on_experts_end()
            feedback.on_cleanup_end(layer)
    assert corrections(feedback) == dict.fromkeys(NAMES, 1) | {"fast": 9 - 2, "rest": 15 - 9 + 23 - 18}


def test_a_fetch_is_timed_from_when_the_one_before_it_was_over():
    feedback = scripted(0, 1, 2, 4, 10, 11, 14)
    feedback.on_routing(0, 1)
    for asked in (feedback.on_request(), feedback.on_request()):
        feedback.on_fetch_start(asked)
        feedback.on_fetch_end(1)
    assert feedback.costs.begin.correction == 4 - 1
    assert feedback.costs.fetch.correction == ((10 - 4) + (14 - 10)) / 2


def test_an_expert_that_was_fetched_early_is_taken_over_when_it_is_needed():
    feedback = scripted(0, 1, 5, 9, 10)
    feedback.on_routing(0, 1)
    feedback.on_fetch_start(0.0)
    fetched = feedback.on_fetch_end(1)
    feedback.on_wait()
    feedback.on_expert_start(1, in_place=False, fetched=fetched)
    assert feedback.costs.take.correction == 10 - 9


def test_prompts_and_the_first_fetches_correct_nothing():
    feedback = scripted(6, 7, *event_times(10))
    feedback.on_fetch_start(5)
    feedback.on_fetch_end(1)
    visit(feedback, 0, tokens=5)
    assert corrections(feedback) == dict.fromkeys(NAMES, 1)
    assert feedback.measured == []
    assert math.isnan(feedback.mape())


def test_predictions_are_compared_with_measurements():
    feedback = scripted(*event_times(0), *event_times(40))  # a step starts after the wrong guess is dropped
    visit(feedback, 0)
    visit(feedback, 1)
    assert feedback.measured == [2 * 32]
    # Layer 0: seven costs of one second each. Layer 1: the costs that layer 0 has measured.
    assert feedback.predicted == [pytest.approx(7 + 5 + 11 + 15 + 4 + 3 + 5 + 2)]
    assert feedback.mape() == pytest.approx(1 - 52 / 64)
