"""Seconds between an engine's moments are what things took; a scripted clock says what they must be."""

from __future__ import annotations

import math

import pytest

from haq_lab.offload.costs.cost_model import Costs, PiecewiseLinear
from haq_lab.offload.engine.cost_feedback import CostFeedback

NAMES = ("fast", "slow", "fetch", "rest", "outside", "issue", "begin", "take")


def scripted(*readings: float) -> CostFeedback:
    """Of two layers. All costs are a second to begin with."""
    curves = {name: PiecewiseLinear([1], [1.0]) for name in NAMES}
    left = iter(readings)
    return CostFeedback(Costs(**curves, expert_bytes=1), "sum", 2, clock=lambda: next(left))


def visit(observer: CostFeedback, layer: int, tokens: int = 1) -> None:
    """One resident, one run in place and one fetched."""
    observer.chosen(layer, tokens)
    observer.decides()
    observer.expects({0: tokens}, {1: tokens}, {2: tokens})
    asked = observer.asks()
    observer.issued(1)
    observer.starts(tokens, in_place=False)
    observer.starts(tokens, in_place=True)
    observer.waits()
    observer.begins(asked)
    observer.starts(tokens, in_place=False, fetched=observer.fetched(1))
    observer.computed()
    observer.finished(layer)


def moments(begin: float) -> list[float]:
    """A second for a wrong guess, 2 for asking, 1 for dispatching; the resident runs for 5, the one in place for 7.

    Clearing up takes 4.

    The fetched one is wanted then, its fetch begins 15 s after it was asked for and takes 4; it is taken over in 3, and
    runs for 5.
    """
    return [begin + after for after in (0, 1, 2, 3, 4, 9, 16, 17, 21, 24, 29, 33)]


def seen(observer: CostFeedback) -> dict[str, float]:
    return {name: getattr(observer.costs, name).correction for name in NAMES}


def test_every_cost_is_what_lies_between_two_moments():
    observer = scripted(*moments(0), *moments(33 + 12), *moments(78 + 12 + 40))
    for layer in (0, 1, 0):
        visit(observer, layer)
    fetching = {"issue": 2, "begin": 15, "fetch": 4, "take": 3}
    assert seen(observer) == {"fast": 5, "slow": 7 + 4, "rest": 12 + 1, "outside": 40 - 1, **fetching}


def test_where_nothing_is_fetched_or_in_place_deciding_and_clearing_up_are_part_of_the_rest():
    observer = scripted(0, 0, 1, 2, 9, 10, 15, 18, 20, 23)
    for layer in range(2):
        observer.chosen(layer, 1)
        observer.decides()
        observer.issued(0)
        observer.starts(1, in_place=False)
        if layer == 0:
            observer.computed()
            observer.finished(layer)
    assert seen(observer) == dict.fromkeys(NAMES, 1) | {"fast": 9 - 2, "rest": 15 - 9 + 23 - 18}


def test_a_fetch_is_timed_from_when_the_one_before_it_was_over():
    observer = scripted(0, 1, 2, 4, 10, 11, 14)
    observer.chosen(0, 1)
    for asked in (observer.asks(), observer.asks()):
        observer.begins(asked)
        observer.fetched(1)
    assert observer.costs.begin.correction == 4 - 1
    assert observer.costs.fetch.correction == ((10 - 4) + (14 - 10)) / 2


def test_what_came_while_others_ran_is_taken_over_from_when_it_is_wanted():
    observer = scripted(0, 1, 5, 9, 10)
    observer.chosen(0, 1)
    observer.begins(0.0)
    fetched = observer.fetched(1)
    observer.waits()
    observer.starts(1, in_place=False, fetched=fetched)
    assert observer.costs.take.correction == 10 - 9


def test_a_prompt_and_what_is_fetched_before_any_token_correct_nothing():
    observer = scripted(6, 7, *moments(10))
    observer.begins(5)
    observer.fetched(1)
    visit(observer, 0, tokens=5)
    assert seen(observer) == dict.fromkeys(NAMES, 1)
    assert observer.measured == []
    assert math.isnan(observer.mape())


def test_predictions_are_held_against_what_followed():
    observer = scripted(*moments(0), *moments(40))  # a step begins when the wrong guess is gone
    visit(observer, 0)
    visit(observer, 1)
    assert observer.measured == [2 * 32]
    # A resident, one in place, a fetch that begins, is taken over and runs, and the issuing: a second each at first,
    # then what layer 0 has taught.
    assert observer.predicted == [pytest.approx(7 + 5 + 11 + 15 + 4 + 3 + 5 + 2)]
    assert observer.mape() == pytest.approx(1 - 52 / 64)
