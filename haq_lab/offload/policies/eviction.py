"""Cache experts: decide which missing experts become resident and which residents are evicted.

The code is compiled, so a trace of a million tokens takes seconds.

The state of an eviction rule is a NamedTuple of arrays. Its field `values` (layers, E) is the worth of each expert. The
resident with the least value is evicted. A rule's module registers one to three compiled functions with `register`:

    touch(state, layer, wanted, counts, tokens, now)   a layer chose the experts `wanted` (n,) int64, ascending;
                                                       counts (E,) int64 of `tokens` tokens chose each expert
    begin(state)                                       a sequence begins
    refresh(state, layer)                              update `values`, because an expert must be evicted

Values are integers and not negative, because the search for the least integer compiles to vector code. The bits of a
positive float32 have the same order as its value. So a rule that computes floats uses `rates.view(int32)`.

Weights are read-only, so an evicted expert is dropped and not written back. A visit that needs more experts than there
are slots bypasses the cache, so a prompt does not flush it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from haq_lab.offload.policies.jit import innermost

STAYS, HELD = -1, -2  # in `placed`: no expert is evicted for this one; this one must not be evicted
BLOCK = 64  # values that are searched at once
_REGISTERED: dict[Any, tuple[Any, Any, Any]] = {}  # Numba finds a rule's functions by the type of its state


@innermost
def _same_in_all_sequences(state):
    pass


@innermost
def _always_up_to_date(state, layer):
    pass


def register(state: type, touch: Any, begin: Any = _same_in_all_sequences, refresh: Any = _always_up_to_date) -> None:
    """Register the compiled functions of an eviction rule, by the type of its state."""
    _REGISTERED[state] = begin, touch, refresh


def _begin(state):
    raise NotImplementedError


def _touch(state, layer, wanted, counts, tokens, now):
    raise NotImplementedError


def _refresh(state, layer):
    raise NotImplementedError


@overload(_begin)
def _begin_of(state):  # numba compares signatures, annotations too
    function = _REGISTERED[state.instance_class][0]
    return lambda state: function(state)


@overload(_touch)
def _touch_of(state, layer, wanted, counts, tokens, now):
    function = _REGISTERED[state.instance_class][1]
    return lambda state, layer, wanted, counts, tokens, now: function(state, layer, wanted, counts, tokens, now)


@overload(_refresh)
def _refresh_of(state, layer):
    function = _REGISTERED[state.instance_class][2]
    return lambda state, layer: function(state, layer)


class ReplayCounts(NamedTuple):
    """Counts of a replay, one per layer, (layers,) int64.

    A pair is one (token, expert) choice. `experts` counts each distinct expert of a visit once, however many tokens
    of a prompt chose it.
    """

    pairs: np.ndarray
    pair_hits: np.ndarray
    experts: np.ndarray
    expert_hits: np.ndarray
    fetched: np.ndarray


def empty_counts(layers: int) -> ReplayCounts:
    return ReplayCounts(*(np.zeros(layers, np.int64) for _ in ReplayCounts._fields))


@innermost
def begin(state):
    """Start a sequence."""
    _begin(state)


@innermost
def visit(state, resident, layer, wanted, counts, tokens, now, per_layer, selective, admit, placed, forms=None):
    """Process one visit of a layer: update the rule, then admit missing experts.

    Args:
        state: State of the rule.
        resident: (layers, E) bool, changed in place. The number of residents does not change; with `per_layer`, that of
            each layer does not.
        layer: Index of the layer.
        wanted: (n,) int64, the chosen experts, ascending.
        counts: (E,) int64, how many of the visit's tokens chose each expert.
        tokens: Number of tokens of the visit.
        now: Number of the token.
        per_layer: Evict only experts of the same layer.
        selective: Do not admit a missing expert that is worth less than every resident.
        admit: (E,) bool, which missing experts may become resident.
        placed: (E,) int64, written for the chosen experts: for an admitted expert, layer * E + expert of the evicted
            one; else -1.
        forms: (layers * E,) int64. An expert may evict only experts of the same form. None if all have the same.
    """
    flat = resident.reshape(-1), state.values.reshape(-1)
    _visit(state, resident, flat, layer, wanted, counts, tokens, now, per_layer, selective, admit, placed, forms)


@innermost
def _visit(state, resident, flat, layer, wanted, counts, tokens, now, per_layer, selective, admit, placed, forms):
    """Do the same. `flat` has residents and values as vectors (layers * E,), because reshaping is slow."""
    layers, count = resident.shape
    here, (there, values) = resident[layer], flat
    _touch(state, layer, wanted, counts, tokens, now)
    missed = 0
    for expert in wanted:
        placed[expert] = STAYS
        missed += admit[expert] and not here[expert]
    first, last = (layer * count, (layer + 1) * count) if per_layer else (0, layers * count)
    if missed == 0 or not _holds(there[first:last], len(wanted)):
        return
    _refresh(state, layer)
    for expert in wanted:  # a chosen expert is not evicted
        if here[expert]:
            here[expert], placed[expert] = False, HELD
    for expert in wanted:
        if placed[expert] == HELD or not admit[expert]:
            continue
        form = 0 if forms is None else forms[layer * count + expert]
        worst = _least(values, there, first, last, forms, form)
        if worst >= 0 and not (selective and values[layer * count + expert] < values[worst]):
            there[worst], placed[expert] = False, worst
    for expert in wanted:
        if placed[expert] != STAYS:
            here[expert] = True
        if placed[expert] == HELD:
            placed[expert] = STAYS


@innermost
def _holds(present, wanted):
    """Return whether there are at least as many slots as chosen experts."""
    slots = 0
    for held in present:
        slots += held
        if slots == wanted:
            return True
    return False


@innermost
def _same_form(forms, index, form):
    """Return whether an expert has the form `form`. Numba drops the test if `forms` is None."""
    return True if forms is None else forms[index] == form


@innermost
def _least(values, present, first, last, forms, form):
    """Return the first index of the least value among the residents from `first` to `last`, or -1 if there are none.

    Only residents of the form `form` count, unless `forms` is None. The first loop finds the block with the least
    value, and the second one finds its place there. Both inner loops compile to vector code.
    """
    kind = values.dtype.type  # narrow integers make wide vectors
    none = kind(np.iinfo(values.dtype).max)
    block, least = -1, none
    for begin in range(first, last, BLOCK):
        end = min(begin + BLOCK, last)
        some, there, low = values[begin:end], present[begin:end], none  # indices from 0 need no sign test
        for index in range(len(some)):
            absent = np.int64(there[index] & _same_form(forms, begin + index, form)) - 1  # all bits set, or none
            low = min(low, kind(some[index] | (absent & none)))
        if low < least:
            block, least = begin, low
    if block < 0:
        return block
    end = min(block + BLOCK, last)
    some, there, place = values[block:end], present[block:end], kind(BLOCK)
    for index in range(len(some)):
        fits = there[index] & _same_form(forms, block + index, form)
        other = np.int64(fits and some[index] == least) - 1  # all bits set, or none
        place = min(place, kind(index | (other & BLOCK)))
    return block + place


@innermost
def replay(state, resident, experts, decode, starts, clock, per_layer, selective, admit, room, tallies, forms=None):
    """Replay a whole trace with one rule. Decoded tokens are visits of one token, and a prompt is one batch.

    Args:
        state: State of the rule.
        resident: (layers, E) bool, changed in place.
        experts, decode, starts: Arrays of a trace. They must fit `resident`, because nothing is checked here.
        clock: Number of tokens that the rule has seen before.
        per_layer, selective: As in `visit`.
        admit: (E,) bool. All False keeps the residents as they are.
        room: (3, E) int64 of zeros, as working memory.
        tallies: Counts, which are added to.
        forms: As in `visit`.
    """
    tokens, layers = experts.shape[:2]
    counts, placed, chosen = room[0], room[1], room[2]
    flat = resident.reshape(-1), state.values.reshape(-1)
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
            wanted = chosen[: _collect(experts[token:end, layer], counts, chosen)]
            here = resident[layer]
            for expert in wanted:
                tallies.pairs[layer] += counts[expert]
                tallies.experts[layer] += 1
                hit = np.int64(here[expert])
                tallies.pair_hits[layer] += hit * counts[expert]
                tallies.expert_hits[layer] += hit
                tallies.fetched[layer] += 1 - hit
            now = clock + end - 1
            switches = per_layer, selective, admit
            _visit(state, resident, flat, layer, wanted, counts, end - token, now, *switches, placed, forms)
            for expert in wanted:
                counts[expert] = 0
        token = end


@innermost
def _collect(choices, counts, chosen):
    """Count the choices (tokens, k), write the chosen experts to `chosen`, ascending, and return their number."""
    found = 0
    for token in range(len(choices)):
        for choice in range(choices.shape[1]):
            expert = np.int64(choices[token, choice])
            counts[expert] += 1
            if counts[expert] == 1:
                at = found
                while at > 0 and chosen[at - 1] > expert:
                    chosen[at] = chosen[at - 1]
                    at -= 1
                chosen[at] = expert
                found += 1
    return found
