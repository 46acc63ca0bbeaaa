"""From what a user writes to expert slots."""

from __future__ import annotations

import numpy as np
import pytest

from haq_lab.offload.budget import Budget
from haq_lab.offload.settings import Offload
from haq_lab.utils.errors import UserError

ALIKE = np.full((24, 10), 1000)


def slots_of(text, sizes=ALIKE):
    """The slots of 240 experts, the first of which are placed first; 4,000 bytes of spare slots, 10,000 reserved."""
    resident_bytes = lambda count: int(sizes.ravel()[:count].sum())  # noqa: E731
    return Budget.parse(text).slots(sizes, resident_bytes, spare_bytes=4000, reserved=10_000)


@pytest.mark.parametrize(
    ("text", "slots"),
    [("40%", 92), ("100%", 240), ("60", 60), (60, 60), ("1000", 240), ("110kB", 96), ("1 GB", 240)],
)
def test_forms(text, slots):
    assert slots_of(text) == slots


@pytest.mark.parametrize(("text", "slots"), [("50%", 88), ("90%", 200), ("100%", 240), ("60", 60), ("51999B", 18)])
def test_experts_of_different_sizes_count_with_their_bytes(text, slots):
    """Of 120 experts of 2,000 bytes and 120 of 1,000 bytes, the larger ones are placed first."""
    assert slots_of(text, np.repeat([2000, 1000], 120).reshape(24, 10)) == slots


@pytest.mark.parametrize("text", ["1%", "13kB", "5 kB"])
def test_nothing_left_is_a_mistake_and_no_silent_off(text):
    with pytest.raises(UserError, match="no slot for an expert of 1,000 bytes"):
        slots_of(text)


@pytest.mark.parametrize("text", ["0", "0%", 0, "0MB"])
def test_no_budget_is_told_before_anything_is_loaded(text):
    with pytest.raises(UserError, match=r"offload\.budget: '0.*' leaves no slot .* or choose offload=none"):
        Offload(budget=text)


@pytest.mark.parametrize("text", ["", "much", "-4", "40 %%", "120%", "1.5", "3 TB"])
def test_other_words_are_refused(text):
    with pytest.raises(UserError, match=r"offload\.budget"):
        Offload(budget=text)


def test_a_unit_misspelt_is_told_the_nearest():
    with pytest.raises(UserError, match="did you mean 'MB'"):
        Budget.parse("500 Mb")


def test_prefetching_needs_room():
    with pytest.raises(UserError, match="at least 2 spare"):
        Offload(prefetch="path", spare=1)


@pytest.mark.parametrize("rule", ["lrv", "belady"])
def test_eviction_is_a_rule_that_an_engine_can_run(rule):
    with pytest.raises(
        UserError, match=rf"offload\.eviction: '{rule}' is not one of none, lru, lfu, moe_infinity, haq"
    ):
        Offload(eviction=rule)


def test_a_misspelt_eviction_rule_gets_a_hint():
    with pytest.raises(UserError, match="did you mean 'lru'"):
        Offload(eviction="lrv")
