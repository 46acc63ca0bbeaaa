"""Compare predicted activation errors with errors measured by rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.numerics import quantize_activations
from haq_lab.quantizers.haq.noise import StaticNoise, dynamic_noise, solved_weight_error


def heavy_tailed(channels: int = 24) -> tuple[InputStatistics, Tensor]:
    x = torch.randn(400, channels) ** 3 * torch.logspace(-1, 1, channels)
    return InputStatistics(400, x.abs().amax(0), x.t() @ x / 400, None, x, torch.ones(400)), x


@pytest.mark.parametrize("scheme", ["token", "tensor"])
def test_dynamic_noise_is_the_mean_squared_rounding_error(scheme):
    statistics, x = heavy_tailed()
    levels, scale = quantize_activations(x, scheme, None)
    measured = (levels.float() * scale - x).square().mean(0)
    torch.testing.assert_close(dynamic_noise(statistics, per_row=scheme == "token"), measured, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("per_row", [True, False])
def test_noise_of_a_divided_input(per_row):
    statistics, x = heavy_tailed()
    factor = torch.linspace(0.5, 2, x.shape[1])
    divided = dynamic_noise(statistics.divided_by(factor), per_row, every=3)
    assert torch.equal(dynamic_noise(statistics, per_row, every=3, factor=factor), divided)


@pytest.mark.parametrize("clip", [1.0, 0.5, 0.1])
def test_static_noise_follows_the_rounding_error_clipping_included(clip):
    statistics, x = heavy_tailed()
    factor = torch.linspace(0.5, 2, x.shape[1])
    scale = (x / factor).abs().amax() / 127 * clip
    levels, _ = quantize_activations(x / factor, "static", scale)
    measured = (levels.float() * scale * factor - x).square().mean(0)
    predicted = StaticNoise(statistics, every=1)(scale * factor)
    # Tabulated at six steps an octave, geometric means in between.
    torch.testing.assert_close(predicted, measured, rtol=0.25, atol=1e-6)


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
    assert StaticNoise(statistics).best_scale(torch.ones(8), energy)[0] == pytest.approx(covering, rel=1e-5)
    energy[0] = 1e-9  # now nobody reads the outlier
    scale, error = StaticNoise(statistics).best_scale(torch.ones(8), energy)
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
        noise = StaticNoise(statistics, every=1)
        factor = min((statistics.channel_max, usual), key=lambda factor: noise.best_scale(factor, cost)[1])
        scale, _ = noise.best_scale(factor, cost)
        levels, _ = quantize_activations(unseen / factor, "static", scale)
        return float((levels.float() * scale * factor - unseen).square().mean(0) @ cost)

    expecting = error_elsewhere()
    monkeypatch.setattr("haq_lab.quantizers.haq.noise.UNSEEN", 0)
    assert expecting < 0.2 * error_elsewhere()


def test_weight_error_does_not_depend_on_a_common_factor():
    scale, ones, variance = torch.rand(6), torch.ones(6), torch.rand(9)
    once = solved_weight_error(scale, ones, variance)
    assert solved_weight_error(scale * 4, ones, variance / 16) == pytest.approx(once)
