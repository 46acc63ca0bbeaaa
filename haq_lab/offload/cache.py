"""The cache of experts: who is resident, who is admitted, who leaves. Compiled, so that a trace of a million tokens
takes seconds.

A rule (least recently used, ...) is a NamedTuple of arrays whose field `values` (layers, E) says how much each
expert is worth keeping; the least valuable resident leaves. What a rule does is three functions that its module
teaches with `teach`:

    begin(state)                               a sequence begins
    touch(state, layer, counts, tokens, now)   `layer` has chosen: counts (E,) int64 over `tokens` tokens
    refresh(state, layer)                      an expert must leave after a visit of `layer`: bring `values` up to date

Weights are read-only: an expert that leaves is forgotten, never written back. A visit that needs more experts than
there are slots in reach bypasses the cache, so that a prompt does not flush it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from haq_lab.offload.compiled import compiled

_TAUGHT: dict[Any, tuple[Any, Any, Any]] = {}  # numba needs to know a rule's functions by the type of its state


def teach(state: type, begin: Any, touch: Any, refresh: Any) -> None:
    """Make a rule's compiled functions known."""
    _TAUGHT[state] = begin, touch, refresh


def _begin(state):
    raise NotImplementedError


def _touch(state, layer, counts, tokens, now):
    raise NotImplementedError


def _refresh(state, layer):
    raise NotImplementedError


@overload(_begin)
def _begin_of(state):  # numba compares signatures, annotations too
    taught = _TAUGHT[state.instance_class][0]
    return lambda state: taught(state)


@overload(_touch)
def _touch_of(state, layer, counts, tokens, now):
    taught = _TAUGHT[state.instance_class][1]
    return lambda state, layer, counts, tokens, now: taught(state, layer, counts, tokens, now)


@overload(_refresh)
def _refresh_of(state, layer):
    taught = _TAUGHT[state.instance_class][2]
    return lambda state, layer: taught(state, layer)


class Tallies(NamedTuple):
    """What a replay counts, a layer each, (layers,) int64.

    Pairs are (token, expert) choices; visits' distinct experts count once however many tokens of a prompt want them.
    """

    pairs: np.ndarray
    pair_hits: np.ndarray
    experts: np.ndarray
    expert_hits: np.ndarray
    fetched: np.ndarray


def empty_tallies(layers: int) -> Tallies:
    return Tallies(*(np.zeros(layers, np.int64) for _ in Tallies._fields))


@compiled
def begin(state):
    """A sequence begins."""
    _begin(state)


@compiled
def visit(state, resident, layer, counts, tokens, now, per_layer, selective, admit, placed):
    """One layer's visit: learn what it chose, then admit what it missed.

    Args:
        state: The rule.
        resident: (layers, E) bool, changed in place; the number of residents (with `per_layer`: in each layer)
            stays what it is.
        counts: (E,) int64, how many of the visit's `tokens` tokens chose each expert.
        now: The token's number.
        per_layer: Only experts of the same layer may leave.
        selective: A missing expert that is worth less than every resident is used and forgotten.
        admit: (E,) bool: which missing experts may become resident.
        placed: (E,) int64, filled: for an admitted expert layer * E + expert of the one that left, else -1.
    """
    layers, count = resident.shape
    _touch(state, layer, counts, tokens, now)
    wanted, missed = 0, 0
    for expert in range(count):
        placed[expert] = -1
        if counts[expert] > 0:
            wanted += 1
            if not resident[layer, expert] and admit[expert]:
                missed += 1
    if missed == 0:
        return
    first, last = (layer, layer + 1) if per_layer else (0, layers)
    slots = 0
    for row in range(first, last):
        for expert in range(count):
            slots += resident[row, expert]
    if wanted > slots:
        return
    _refresh(state, layer)
    values = state.values
    for expert in range(count):
        if counts[expert] == 0 or resident[layer, expert] or not admit[expert]:
            continue
        worst, worst_value = -1, np.inf
        for row in range(first, last):
            for other in range(count):
                if resident[row, other] and values[row, other] < worst_value:
                    if row == layer and counts[other] > 0:
                        continue
                    worst, worst_value = row * count + other, values[row, other]
        if worst >= 0 and not (selective and values[layer, expert] < worst_value):
            resident[worst // count, worst % count] = False
            resident[layer, expert] = True
            placed[expert] = worst


@compiled
def replay(state, resident, experts, decode, starts, clock, per_layer, selective, admits, tallies):
    """A whole trace under one rule: decoded tokens one by one, a prompt's tokens as one batch.

    Args:
        experts, decode, starts: A trace's arrays; they must fit `resident`, nothing is checked here.
        clock: Tokens that the rule has seen before.
        admits: False keeps the residents as they are.
        tallies: Counts, added to.
    """
    tokens, layers, k = experts.shape
    count = resident.shape[1]
    counts, placed = np.zeros(count, np.int64), np.zeros(count, np.int64)
    admit = np.full(count, admits)
    sequence, token = 0, 0
    while token < tokens:
        if sequence < len(starts) and starts[sequence] == token:
            _begin(state)
            sequence += 1
        limit = starts[sequence] if sequence < len(starts) else tokens
        end = token + 1
        while not decode[token] and end < limit and not decode[end]:
            end += 1
        for layer in range(layers):
            counts[:] = 0
            for one in range(token, end):
                for choice in range(k):
                    counts[experts[one, layer, choice]] += 1
            for expert in range(count):
                if counts[expert] > 0:
                    tallies.pairs[layer] += counts[expert]
                    tallies.experts[layer] += 1
                    if resident[layer, expert]:
                        tallies.pair_hits[layer] += counts[expert]
                        tallies.expert_hits[layer] += 1
                    else:
                        tallies.fetched[layer] += 1
            visit(state, resident, layer, counts, end - token, clock + end - 1, per_layer, selective, admit, placed)
        token = end
