"""Seconds between an engine's moments are what things took; a scripted clock says what they must be."""

from __future__ import annotations

import math
from itertools import chain

import pytest

from haq_lab.offload.costs import Costs, PiecewiseLinear
from haq_lab.offload.observer import Observer


def unit_costs() -> Costs:
    return Costs(*(PiecewiseLinear([1], [1.0]) for _ in range(5)), expert_bytes=1, issue=PiecewiseLinear([1], [1.0]))


def visit(observer: Observer, layer: int, tokens: int = 1) -> None:
    """One resident, one fetched, one run in place."""
    observer.routed(layer, tokens, {0: tokens}, {1: tokens}, {2: tokens})
    observer.issued(1)
    observer.starts(tokens, in_place=False)
    observer.waits()
    observer.starts(tokens, in_place=True)
    observer.finished(layer)


def scripted(*visits: list[float]) -> Observer:
    """Two layers; a list a visit: routed, issued, start, waits, start, last expert over, finished."""
    readings = chain.from_iterable(visits)
    return Observer(unit_costs(), "sum", 2, clock=lambda: next(readings))


def test_every_cost_is_what_lies_between_two_moments():
    first, second, third = [0, 2, 3, 8, 10, 17, 17], [30, 32, 33, 38, 40, 47, 47], [100, 102, 103, 108, 110, 117, 117]
    observer = scripted(first, second, third)
    for layer in (0, 1, 0):
        visit(observer, layer)
    costs = observer.costs
    seen = {name: getattr(costs, name).correction for name in ("issue", "fast", "slow", "rest", "outside")}
    assert seen == {"issue": 2, "fast": 5, "slow": 7, "rest": 30 - 17, "outside": 100 - 47 - 13}


def test_a_prompt_corrects_nothing_and_is_no_step():
    observer = scripted([0])
    observer.routed(0, 5, {0: 5}, {}, {})
    assert observer.measured == []
    assert math.isnan(observer.mape())


def test_predictions_are_held_against_what_followed():
    one = [0, 1, 1, 2, 2, 3, 4]
    observer = scripted(one, [each + 10 for each in one])
    visit(observer, 0)
    visit(observer, 1)
    assert observer.measured == [8.0]
    # A resident, a fetched one that is computed too, one in place and the issuing: 5 s, and for layer 1, as layer 0 has
    # taught nothing else, the same.
    assert observer.predicted == [pytest.approx(10.0)]
    assert observer.mape() == pytest.approx(0.25)
