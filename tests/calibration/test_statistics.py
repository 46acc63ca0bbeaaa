"""Compare the statistics with their definitions, computed over all rows at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.calibration.statistics import (
    EXTREME_ROWS,
    SAMPLE_ROWS,
    Accumulator,
    InputStatistics,
    Needs,
    Sensitivity,
)
from haq_lab.quantizers.gptq_solver import factorize, solve
from haq_lab.quantizers.grid import round_to_nearest, row_scale

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


@pytest.mark.parametrize("channels", [3, 4, 9, 12])
def test_a_hessian_is_whole_whatever_its_parts(monkeypatch, channels):
    monkeypatch.setattr("haq_lab.calibration.statistics.COLUMNS", 4)
    x = torch.randn(50, channels)
    hessian = accumulate(x, None, [20, 30], Needs(inputs=True, hessian=True)).hessian
    torch.testing.assert_close(hessian, x.t() @ x / 50)
    assert torch.equal(hessian.tril(-4), hessian.t().tril(-4))


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


def test_unneeded_statistics_are_not_computed():
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


def test_divided_by_gives_the_statistics_after_smoothing():
    x, x_fp, factor = torch.randn(500, 6), torch.randn(500, 6), 10 ** (2 * torch.rand(6) - 1)
    divided = accumulate(x, x_fp, [200, 300]).divided_by(factor)
    direct = accumulate(x / factor, x_fp / factor, [200, 300])
    for name in ("channel_max", "hessian", "cross"):
        torch.testing.assert_close(getattr(divided, name), getattr(direct, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(divided.sample[:-EXTREME_ROWS], direct.sample[:-EXTREME_ROWS])
    assert divided.count == direct.count
    assert torch.equal(divided.sample_weight, direct.sample_weight)


def test_an_error_of_the_smoothed_input_costs_its_factor_squared():
    """An error e of x / s is an error s e of x. Outputs stay the same."""
    sensitivity = Sensitivity(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0]))
    seen = InputStatistics(1, torch.ones(3), sensitivity=sensitivity)
    divided = seen.divided_by(torch.tensor([2.0, 0.5, 1.0])).sensitivity
    assert divided.channels.tolist() == [4.0, 0.5, 3.0]
    assert divided.outputs.tolist() == [5.0]


def test_few_tokens_shrink_the_hessian_towards_its_diagonal():
    x = torch.randn(30, 10)
    statistics = accumulate(x, None, [30], Needs(inputs=True, hessian=True))
    hessian = statistics.hessian
    shrunk = statistics.shrunk_hessian()
    assert torch.equal(shrunk.diagonal(), hessian.diagonal())
    torch.testing.assert_close(shrunk[0, 1:], hessian[0, 1:] * 30 / 40)
    torch.testing.assert_close(statistics.standing_in().shrunk_hessian()[0, 1:], hessian[0, 1:] * 3 / 13)
    factor = torch.rand(10) + 0.5  # smoothing before or after is the same
    torch.testing.assert_close(statistics.divided_by(factor).shrunk_hessian(), shrunk / (factor[:, None] * factor))


def test_solving_under_few_tokens_is_no_worse_than_rounding():
    """On unseen tokens, the solution with the unshrunk Hessian is worse than rounding, so it is shrunk."""
    mix = torch.eye(96) + 0.05 * torch.randn(96, 96)
    seen, unseen = torch.randn(100, 96) @ mix, torch.randn(5000, 96) @ mix
    statistics = accumulate(seen, None, [100], Needs(inputs=True, hessian=True))
    weight = torch.randn(64, 96)
    scale = row_scale(weight, 8)

    def error(levels):
        return (unseen @ (levels.float() * scale[:, None] - weight).t()).square().mean()

    def solved(hessian):
        return error(solve(weight, factorize(hessian, 0.01, True), scale, 8))

    nearest = error(round_to_nearest(weight, scale, 8))
    assert solved(statistics.hessian) > 1.2 * nearest
    assert solved(statistics.shrunk_hessian()) < nearest


def test_an_expert_uses_its_own_statistics_if_it_has_any():
    shared, own = InputStatistics(9, torch.ones(2)), InputStatistics(4, torch.ones(2))
    shared.routed = {1: own}
    assert shared.of(None) is shared
    assert shared.of(1) is own
    assert shared.of(0) is shared
    assert shared.standing_in().stands_in
    assert shared.standing_in().routed == {}
