"""Statistics equal their definitions, computed at once over all rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.calibration.statistics import EXTREME_ROWS, SAMPLE_ROWS, Accumulator, Needs

ALL = Needs(inputs=True, hessian=True, cross=True, sample=True)


def accumulate(x: torch.Tensor, x_fp: torch.Tensor | None, sizes: list[int], needs: Needs = ALL):
    accumulator = Accumulator(x.shape[1], len(x), needs)
    for rows in torch.arange(len(x)).split(sizes):
        accumulator.add(x[rows], None if x_fp is None else x_fp[rows])
    return accumulator.finish()


@given(st.integers(0, 2**16), st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(1, 12))
def test_equal_direct_computation_whatever_the_batches(seed, sizes, channels):
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    x = torch.randn(count, channels, generator=generator) + 1
    x_fp = x + 0.1 * torch.randn(count, channels, generator=generator)
    statistics = accumulate(x, x_fp, sizes)
    assert statistics.count == count
    assert float(statistics.sample_weight.sum()) == pytest.approx(count)
    assert (statistics.sample_weight >= 0).all()
    if count:
        torch.testing.assert_close(statistics.channel_max, x.abs().amax(0))
        torch.testing.assert_close(statistics.hessian, x.t() @ x / count, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.cross, (x_fp - x).t() @ x / count, rtol=1e-4, atol=1e-5)


def test_sample_is_even_rows_and_the_extreme_ones():
    x = torch.rand(4 * SAMPLE_ROWS, 3)
    extreme = torch.randperm(len(x))[:EXTREME_ROWS]
    x[extreme, 1] -= 50
    statistics = accumulate(x, None, [100, 333, len(x) - 433])
    even, last = statistics.sample[:-EXTREME_ROWS], statistics.sample[-EXTREME_ROWS:]
    assert torch.equal(even, x[::4])
    assert torch.equal(last.sort(0).values, x[extreme].sort(0).values)
    assert (statistics.sample_weight[-EXTREME_ROWS:] == 1).all()


def test_weighted_sample_estimates_a_mean():
    x = torch.randn(5000, 2)
    statistics = accumulate(x, None, [1250] * 4)
    estimate = statistics.sample_weight @ statistics.sample.square() / statistics.sample_weight.sum()
    torch.testing.assert_close(estimate, x.square().mean(0), rtol=0.2, atol=0)


def test_what_nobody_needs_is_not_computed():
    statistics = accumulate(torch.randn(9, 4), None, [9], Needs(inputs=True))
    assert statistics.hessian is None
    assert statistics.cross is None
    assert statistics.sample is None
    assert statistics.channel_max.shape == (4,)


def test_no_rows_at_all():
    statistics = Accumulator(3, 0, ALL).finish()
    assert statistics.count == 0
    assert (statistics.hessian == 0).all()
    assert statistics.sample.shape == (0, 3)


def test_divided_by_is_what_the_smoothed_linear_sees():
    x, x_fp, factor = torch.randn(500, 6), torch.randn(500, 6), 10 ** (2 * torch.rand(6) - 1)
    divided = accumulate(x, x_fp, [200, 300]).divided_by(factor)
    direct = accumulate(x / factor, x_fp / factor, [200, 300])
    for name in ("channel_max", "hessian", "cross"):
        torch.testing.assert_close(getattr(divided, name), getattr(direct, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(divided.sample[:-EXTREME_ROWS], direct.sample[:-EXTREME_ROWS])
    assert divided.count == direct.count
    assert torch.equal(divided.sample_weight, direct.sample_weight)
