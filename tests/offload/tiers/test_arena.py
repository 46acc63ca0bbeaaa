"""Test that the arena never loses a slot or assigns it twice, and that slots are page aligned."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.offload.tiers.arena import Arena, page_aligned
from haq_lab.offload.tiers.disk import PAGE, Layout, Layouts


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_slots_are_neither_lost_nor_held_twice(keys):
    """A key that has a slot gives it back, another takes one of its size if there is one."""
    layouts = Layouts([Layout([], 2 * PAGE), Layout([], PAGE)], np.arange(16).reshape(4, 4) % 3 % 2, [])
    counts = (3, 2)
    arena = Arena(counts, layouts)
    for key in keys:
        if key in arena.slot_of:
            arena.release(key)
        elif arena.free(key):
            arena.take(key)
            arena.blob(key).fill_(16 * key[0] + key[1])
        arena.check()
        alike = [held for held in arena.slot_of if layouts.index[held] == layouts.index[key]]
        assert arena.free(key) + len(alike) == counts[layouts.index[key]]
        for held in arena.slot_of:
            assert arena.blob(held).shape == (layouts.of(*held).size,)
            assert (arena.blob(held) == 16 * held[0] + held[1]).all(), "nobody wrote over it"
            assert arena.blob(held).data_ptr() % PAGE == 0
    assert arena.bytes == (3 * 2 + 2) * PAGE


@given(st.integers(1, 1000))
def test_memory_is_aligned(size):
    assert page_aligned(size).data_ptr() % PAGE == 0
    assert page_aligned(size).shape == (size,)
