"""Compiled caches against plain Python, Belady against every other, and what no cache may do."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.offload.policies.path_model import fit_path_model
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.utils.errors import UserError

RULES = ("none", "lru", "lfu", "moe_infinity", "haq")


def plain_hits(trace, resident, rule, scope, forms):
    """LRU and LFU as one would write them down: hits by layer. An expert takes the place of one of its form."""
    held = {(layer, int(e)) for layer in range(trace.layers) for e in np.flatnonzero(resident[layer])}
    used, counts, clock = Counter(), Counter(), 0
    hits = np.zeros(trace.layers)
    for token in range(trace.tokens):
        for layer in range(trace.layers):
            clock += 1
            wanted = sorted({(layer, int(e)) for e in trace.experts[token, layer]})
            for key in wanted:
                hits[layer] += key in held
                used[key], counts[key] = clock, counts[key] + 1
            reach = [key for key in held if scope == "global" or key[0] == layer]
            if len(wanted) > len(reach):
                continue
            for key in wanted:
                if key not in held:
                    reach = [k for k in held if (scope == "global" or k[0] == layer) and k not in wanted]
                    reach = [k for k in reach if forms[k] == forms[key]]
                    worth = (lambda k: (used[k], k)) if rule == "lru" else (lambda k: (counts[k], used[k], k))
                    if reach:
                        held.remove(min(reach, key=worth))
                        held.add(key)
    return hits


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rule", ["lru", "lfu"])
@given(seed=st.integers(0, 1000), slots=st.integers(4, 31), several=st.integers(1, 3))
def test_lru_and_lfu_are_what_they_say(make_trace, rule, scope, seed, slots, several):
    trace = make_trace(tokens=60, seed=seed)
    resident = place("uniform", trace, slots)
    forms = np.random.default_rng(seed).integers(0, several, resident.shape)
    policy = make_policy(rule, resident, trace, scope, forms=forms)
    rates = policy.replay(trace)
    np.testing.assert_array_equal(
        np.rint(rates.by_layer * trace.tokens * trace.k), plain_hits(trace, resident, rule, scope, forms)
    )
    np.testing.assert_array_equal(np.bincount(forms[policy.resident]), np.bincount(forms[resident]))


@given(seed=st.integers(0, 1000), slots=st.integers(8, 31))
def test_belady_bounds_every_cache(make_trace, seed, slots):
    trace = make_trace(tokens=100, seed=seed)
    resident = place("frequency", trace, slots)
    bound = make_policy("belady", resident, trace).replay(trace).pairs
    for rule in ("lru", "lfu", "moe_infinity", "none"):
        assert make_policy(rule, resident, trace).replay(trace).pairs <= bound + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_belady_is_optimal_on_a_small_case(make_trace, seed):
    """Against every choice of who leaves, or of letting the missing one pass, by exhaustive search."""
    trace = make_trace(tokens=14, layers=1, experts=5, k=1, sequences=1, seed=seed)
    resident = place("uniform", trace, 2)

    @cache
    def best(held, token):
        if token == trace.tokens:
            return 0
        wanted = int(trace.experts[token, 0, 0])
        if wanted in held:
            return 1 + best(held, token + 1)
        return max(best(after, token + 1) for after in (held, *((held - {one}) | {wanted} for one in held)))

    rates = make_policy("belady", resident, trace).replay(trace)
    assert round(rates.pairs * trace.tokens) == best(frozenset(np.flatnonzero(resident[0]).tolist()), 0)


@pytest.mark.parametrize("several", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_engines_clock_and_the_replay_agree(make_trace, rule, several):
    """Visit by visit, as the engine and the simulator drive it, or all at once: one policy."""
    profile, trace = make_trace(), make_trace(seed=0, tokens=120)
    resident = place("frequency", profile, 12)
    model = fit_path_model(profile, steps=50)
    forms = np.arange(resident.size).reshape(resident.shape) % several
    whole, stepwise = (make_policy(rule, resident, profile, path_model=model, forms=forms) for _ in range(2))
    rates = whole.replay(trace)
    hits = 0
    for token in range(trace.tokens):
        if token in trace.starts:
            stepwise.begin()
        for layer in range(trace.layers):
            counts = np.bincount(trace.experts[token, layer], minlength=8)
            before = stepwise.resident.copy()
            visit = stepwise.visit(layer, counts, 1)
            hits += len(visit.wanted) - len(visit.missing)
            assert stepwise.slots == 12
            changed = [(int(a), int(b)) for a, b in zip(*np.nonzero(stepwise.resident & ~before), strict=True)]
            assert sorted(changed) == sorted((layer, expert) for expert in visit.replaces)
            assert all(before[left] and not stepwise.resident[left] for left in visit.replaces.values())
            assert all(forms[layer, expert] == forms[left] for expert, left in visit.replaces.items())
    assert hits == round(rates.pairs * trace.tokens * trace.layers * trace.k)
    np.testing.assert_array_equal(whole.resident, stepwise.resident)


def test_a_prompt_that_wants_more_than_there_are_slots_bypasses(make_trace):
    trace = make_trace(tokens=100, prompt=100, sequences=1)
    resident = place("uniform", trace, 8)
    policy = make_policy("lru", resident, trace, "layer")
    rates = policy.replay(trace)
    np.testing.assert_array_equal(policy.resident, resident)
    assert rates.experts < rates.pairs  # a prompt's frequent experts are the resident ones
    assert rates.fetched == 4 * 8 - 8


def test_haq_beats_lru_and_lfu_where_paths_repeat(make_trace):
    # One generator seed: the same kinds of tokens, another text.
    both = make_trace(tokens=6000, layers=8, sequences=12)
    profile, test = both.part(slice(0, 8)), both.part(slice(8, 12))
    model = fit_path_model(profile, steps=300)
    for slots in (16, 32):
        resident = place("two_stage", profile, slots)
        rates = {rule: make_policy(rule, resident, profile, path_model=model).replay(test).pairs for rule in RULES}
        per_layer = [make_policy(rule, place("uniform", profile, slots), profile, "layer") for rule in ("lru", "lfu")]
        best = max(*(policy.replay(test).pairs for policy in per_layer), rates["lru"], rates["lfu"], rates["none"])
        assert rates["haq"] > best


def test_zero_slots_and_unknown_names_are_mistakes(make_trace):
    trace = make_trace()
    with pytest.raises(UserError, match="holds no expert"):
        place("uniform", trace, 0)
    with pytest.raises(UserError, match="did you mean 'frequency'"):
        place("frequencies", trace, 4)
    with pytest.raises(UserError, match="did you mean 'lru'"):
        make_policy("lrv", place("uniform", trace, 4), trace)
