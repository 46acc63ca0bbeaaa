"""Thin the tests, so that `make test` takes minutes. `pytest --all` and `make test-all` run all of them.

A test with three or more parameters runs on a subset of its grid. The subset has every pair of values of two parameters
that the whole grid has. Most faults need at most two settings to show (Kuhn et al., IEEE TSE 2004).
`pytest.mark.every(n)` keeps every n-th case of a long list. `pytest.mark.slow` leaves a test out.
"""

from __future__ import annotations

from itertools import combinations

import pytest

Pair = tuple[tuple[str, str], tuple[str, str]]


def thin(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split `items` into those to run and those to leave out, both in the order given."""
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept: set[pytest.Item] = set()
    for group in by_test.values():
        if (every := group[0].get_closest_marker("every")) is not None:
            kept |= set(group[:: every.args[0]])
        else:
            kept |= set(_cover([(item, _pairs(item)) for item in group if item.get_closest_marker("slow") is None]))
    return [item for item in items if item in kept], [item for item in items if item not in kept]


def _pairs(item: pytest.Item) -> set[Pair]:
    """All pairs of values of an item; none if it has fewer than three parameters."""
    values: list[tuple[str, str]] = []
    if (spec := getattr(item, "callspec", None)) is not None:
        values = [(name, repr(value)) for name, value in sorted(spec.params.items())]
    return set(combinations(values, 2)) if len(values) > 2 else set()


def _cover(group: list[tuple[pytest.Item, set[Pair]]]) -> list[pytest.Item]:
    """A small subset whose pairs are those of the whole group: greedy, the first of equals, so deterministic."""
    chosen = [item for item, pairs in group if not pairs]
    rest = [(item, pairs) for item, pairs in group if pairs]
    missing = set[Pair]().union(*(pairs for _, pairs in rest))
    while missing:
        best, pairs = max(rest, key=lambda entry: len(entry[1] & missing))
        chosen.append(best)
        missing -= pairs
    return chosen
