"""Test the weight grids: one scale a row, symmetric levels, ties to even."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.int8.weight_format import WeightFormat
from haq_lab.quantizers.grid import (
    qmax,
    round_to_nearest,
    row_scale,
    searched_row_scale,
    searched_scale,
    weight_scale,
)

bits_of = st.sampled_from([8, 4])


def draw(seed: int, rows: int, columns: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10**spread
    weight[torch.rand(rows, generator=generator) < 0.2] = 0
    return weight


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 33), st.floats(-30, 30), bits_of)
def test_levels_are_in_bounds_and_within_half_a_step(seed, rows, columns, spread, bits):
    weight = draw(seed, rows, columns, spread)
    scale = row_scale(weight, bits)
    levels = round_to_nearest(weight, scale, bits)
    assert levels.dtype == torch.int8
    assert int(levels.abs().max()) <= qmax(bits)
    error = (levels.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()
    zero = weight.abs().amax(dim=1) == 0
    assert (scale[zero] == 1).all()
    assert (levels[zero] == 0).all()
    # The largest entry of a row is met exactly, up to float rounding.
    assert (levels.abs().amax(dim=1)[~zero] == qmax(bits)).all()


def test_four_bits_are_symmetric():
    assert (qmax(8), qmax(4)) == (127, 7)
    levels = round_to_nearest(torch.tensor([[-1e9, 1e9, 0.5, 1.5, 2.5, -0.5, -1.5]]), torch.ones(1), 4)
    assert levels.tolist() == [[-7, 7, 0, 2, 2, 0, -2]]


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 40), bits_of)
def test_searched_scale_is_never_worse_than_the_unsearched_one(seed, rows, columns, bits):
    weight = draw(seed, rows, columns, 0)
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed))

    def error(scale):
        rounded = round_to_nearest(weight, scale, bits).float() * scale[:, None]
        return (rounded - weight).square() @ importance

    full, searched = row_scale(weight, bits), searched_row_scale(weight, importance, bits)
    assert (error(searched) <= error(full) + 1e-7).all()
    assert (searched <= full * 1.0001).all()
    assert (searched >= full * 0.6999).all()


def test_search_clips_a_lone_large_weight_that_does_not_matter():
    weight = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([1.4])])[None]
    importance = torch.cat([torch.ones(63), torch.zeros(1)])
    assert searched_row_scale(weight, importance, 4) < 0.8 * row_scale(weight, 4)


@pytest.mark.parametrize("columns", [1, 31, 32, 70, 200])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_each_group_is_rounded_as_a_weight_of_its_own(columns, group):
    weight, importance, format = torch.randn(5, columns), torch.rand(columns), WeightFormat(4, group)
    for scale, alone in (
        (weight_scale(weight, format), lambda part, own: row_scale(part, 4)),
        (searched_scale(weight, importance, format), lambda part, own: searched_row_scale(part, own, 4)),
    ):
        levels = round_to_nearest(weight, scale, 4, group)
        parts = zip(weight.split(group, 1), importance.split(group), scale, levels.split(group, 1), strict=True)
        for part, own, row_scales_, rounded in parts:
            assert torch.equal(row_scales_, alone(part, own))
            assert torch.equal(rounded, round_to_nearest(part, row_scales_, 4))
