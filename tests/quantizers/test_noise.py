"""Compare predicted activation errors with errors measured by rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.numerics import quantize_activations
from haq_lab.quantizers.haq.noise import best_static_scale, dynamic_noise, static_noise


def heavy_tailed(channels: int = 24) -> tuple[InputStatistics, Tensor]:
    x = torch.randn(400, channels) ** 3 * torch.logspace(-1, 1, channels)
    return InputStatistics(400, x.abs().amax(0), x.t() @ x / 400, None, x, torch.ones(400)), x


@pytest.mark.parametrize("scheme", ["token", "tensor"])
def test_dynamic_noise_is_the_mean_squared_rounding_error(scheme):
    statistics, x = heavy_tailed()
    levels, scale = quantize_activations(x, scheme, None)
    measured = (levels.float() * scale - x).square().mean(0)
    torch.testing.assert_close(dynamic_noise(statistics, per_row=scheme == "token"), measured, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("clip", [1.0, 0.5, 0.1])
def test_static_noise_is_the_mean_squared_rounding_error_clipping_included(clip):
    statistics, x = heavy_tailed()
    scale = x.abs().amax() / 127 * clip
    levels, _ = quantize_activations(x, "static", scale)
    measured = (levels.float() * scale - x).square().mean(0)
    torch.testing.assert_close(static_noise(statistics, scale), measured, rtol=1e-4, atol=1e-9)


def test_rows_count_by_their_weight():
    statistics, x = heavy_tailed()
    doubled = InputStatistics(800, statistics.channel_max, None, None, x[:200], torch.full((200,), 4.0))
    levels, scale = quantize_activations(x[:200], "token", None)
    measured = (levels.float() * scale - x[:200]).square().mean(0)
    torch.testing.assert_close(dynamic_noise(doubled, per_row=True), measured, rtol=1e-4, atol=1e-9)


def test_best_scale_clips_a_lone_outlier_that_costs_little_and_no_other():
    x = torch.rand(400, 8) * 2 - 1
    x[0, 0] = 1000.0
    energy = torch.ones(8)
    statistics = InputStatistics(400, x.abs().amax(0), None, None, x, torch.ones(400))
    covering = 1000 / 127
    assert best_static_scale(statistics, energy)[0] == pytest.approx(covering, rel=1e-5)
    energy[0] = 1e-9  # now nobody reads the outlier
    scale, error = best_static_scale(statistics, energy)
    assert scale < covering / 10
    assert error < 0.1


def test_unseen_values_prevent_equal_channel_maxima(monkeypatch):
    """A factor that makes the maxima of all channels equal has the smallest error on calibration rows.

    It has the largest error on other rows, because each channel sometimes exceeds its range.
    """
    usual = torch.logspace(-1, 1, 256)
    seen, unseen = (torch.randn(rows, 256) ** 3 * usual for rows in (300, 3000))
    statistics = InputStatistics(300, seen.abs().amax(0), None, None, seen, torch.ones(300))
    cost = usual**-2

    def error_elsewhere() -> float:
        factors = statistics.channel_max, usual
        chosen = {factor: best_static_scale(statistics.divided_by(factor), cost * factor**2) for factor in factors}
        factor = min(factors, key=lambda factor: chosen[factor][1])
        levels, scale = quantize_activations(unseen / factor, "static", chosen[factor][0])
        return float((levels.float() * scale * factor - unseen).square().mean(0) @ cost)

    expecting = error_elsewhere()
    monkeypatch.setattr("haq_lab.quantizers.haq.noise.UNSEEN", 0)
    assert expecting < 0.2 * error_elsewhere()
