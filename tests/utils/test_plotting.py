"""When an axis is logarithmic."""

from __future__ import annotations

import math

import pytest

from haq_lab.utils.plotting import DECADES, linear_width, needs_log


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([0.5, 3.0, 140.0], True),
        ([-0.01, 0.2, 3.2], False),  # 0.2 is seen
        ([0.2, 3.2, 106.0, 105.0], True),
        ([0.5, 140.0], False),  # two bars hide nothing
        ([0.0, math.nan, math.inf, 0.5, 140.0], False),
        ([], False),
    ],
)
def test_a_large_value_must_not_hide_the_others(values, log):
    assert needs_log(values) is log


def test_the_linear_part_ends_at_a_power_of_ten_below_the_smallest_value():
    assert linear_width([0.0, -0.5, 140.0, math.nan]) == pytest.approx(0.1)
    assert linear_width([1e-9, 140.0]) == pytest.approx(10.0 ** (2 - DECADES))
    assert linear_width([]) == 1.0
