"""The greedy knapsack keeps the average and is close to the best choice, which small cases allow to try out."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from haq_lab.quantizers.bit_allocation import Choice, allocate

choices = st.lists(st.builds(Choice, st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=8)


def left(bits, linears):
    return sum(choice.error for key, choice in enumerate(linears) if bits[key] == 4)


def average(bits, linears):
    return sum(choice.weights * bits[key] for key, choice in enumerate(linears)) / sum(one.weights for one in linears)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(linears=choices, wanted=st.floats(4, 8))
def test_the_error_left_is_near_that_of_the_best_choice(linears, wanted):
    bits = allocate(dict(enumerate(linears)), wanted)
    assert average(bits, linears) <= wanted + 1e-9
    every = (dict(enumerate(some)) for some in product((4, 8), repeat=len(linears)))
    best = min(left(some, linears) for some in every if average(some, linears) <= wanted)
    assert best <= left(bits, linears) <= best + max(choice.error for choice in linears) + 1e-9


def test_linears_of_equal_size_are_chosen_by_their_error():
    linears = {name: Choice(10, error) for name, error in (("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 0.5))}
    assert allocate(linears, 6) == {"a": 4, "b": 8, "c": 8, "d": 4}
    assert set(allocate(linears, 4).values()) == {4}
    assert set(allocate(linears, 8).values()) == {8}


def test_a_small_linear_takes_the_room_that_a_large_one_cannot():
    linears = {"large": Choice(90, 9.0), "small": Choice(10, 0.5)}
    assert allocate(linears, 4.5) == {"large": 4, "small": 8}
