"""Test the decisions of HAQ one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.numerics import quantize_activations
from haq_lab.models.families.family import Group
from haq_lab.models.families.lookup import FAMILIES
from haq_lab.quantizers.base import ActivationChoice, Solution, output_error
from haq_lab.quantizers.haq.noise import best_static_scale, dynamic_noise, uniform_sensitivity
from haq_lab.quantizers.haq.quantizer import HAQ, balancing_factor
from haq_lab.quantizers.smoothing import ChannelMap
from haq_lab.utils.errors import UserError

LLAMA = next(family for family in FAMILIES if family.model_type == "llama")
UP = Group("up", "up", ("down",))
K = 32


def outliers(cross: bool = False) -> tuple[InputStatistics, Tensor]:
    """Inputs with correlated channels, two of them 100 times larger than the others."""
    x = torch.randn(600, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K))
    x[:, :2] *= 100
    moment = x.t() @ x / len(x)
    drift = 0.02 * moment if cross else None  # x_fp = 1.02 x: the quantised model's input is 2 % too small
    return InputStatistics(len(x), x.abs().amax(0), moment, drift, x, torch.ones(len(x))), x


def channels() -> ChannelMap:
    layer = nn.Module()
    layer.up, layer.down = nn.Linear(8, K), nn.Linear(K, 8)
    return ChannelMap(UP, layer, K)


def smoothing(quantizer: HAQ, weight: Tensor, statistics: InputStatistics):
    return quantizer.smoothing(UP, LLAMA, weight, statistics, channels())


@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
def test_the_factor_lowers_the_true_error_of_every_scheme(scheme):
    weight = torch.randn(20, K)
    statistics, x = outliers()
    quantizer = HAQ(activations=scheme)

    def true_error(factor: Tensor) -> float:
        smoothed, seen = weight * factor, statistics.divided_by(factor)
        activation = quantizer.activation(smoothed, seen)
        solution = quantizer.solve(smoothed, seen, activation)
        levels, scale = quantize_activations(x / factor, activation.scheme, activation.scale)
        y = (levels.float() * scale) @ (solution.levels.float() * solution.scale[:, None]).t()
        return float((y - x @ weight.t()).square().mean())

    assert true_error(smoothing(quantizer, weight, statistics).factor) < 0.5 * true_error(torch.ones(K))


def test_the_factor_equalises_the_energy_and_the_cost_of_every_channel():
    energy, cost = torch.rand(K) * torch.logspace(-3, 3, K), torch.rand(K) * torch.logspace(2, -2, K)
    factor = balancing_factor(energy, cost)
    ratio = (energy / factor.square()) / (cost * factor.square())
    torch.testing.assert_close(ratio, ratio[:1].expand(K))
    torch.testing.assert_close(factor.log().mean(), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_the_factor_is_the_minimum_of_energy_times_cost():
    energy, cost = torch.rand(K) + 0.01, torch.rand(K) + 0.01
    best = balancing_factor(energy, cost)

    def objective(factor: Tensor) -> float:
        return float((energy / factor.square()).sum() * (cost * factor.square()).sum())

    for _ in range(20):
        assert objective(best) <= objective(best * (0.2 * torch.randn(K)).exp())


@pytest.mark.parametrize(("energy", "cost"), [(torch.zeros(K), torch.ones(K)), (torch.ones(K), torch.zeros(K))])
def test_dead_channels_have_a_finite_factor(energy, cost):
    torch.testing.assert_close(balancing_factor(energy, cost), torch.ones(K))
    energy[0] = cost[0] = 1.0
    factor = balancing_factor(energy, cost)
    assert torch.isfinite(factor).all()
    assert (factor > 0).all()


def test_the_factor_uses_the_sensitivity():
    weight, (statistics, _) = torch.randn(20, K), outliers()
    statistics.sensitivity = uniform_sensitivity(weight)
    plain = smoothing(HAQ(), weight, statistics).factor
    statistics.sensitivity.channels[3] /= 16
    ratio = smoothing(HAQ(), weight, statistics).factor / plain
    torch.testing.assert_close(ratio / ratio[0], torch.tensor([1.0] * 3 + [2.0] + [1.0] * (K - 4)))


def test_only_the_chosen_folds_are_smoothed():
    weight, (statistics, _) = torch.randn(20, K), outliers()
    assert smoothing(HAQ(fold=("norm",)), weight, statistics) is None
    assert smoothing(HAQ(fold=("norm", "up")), weight, statistics) is not None


def test_a_fixed_strength_gives_smoothquants_factor():
    weight, (statistics, _) = torch.randn(20, K), outliers()
    fixed = smoothing(HAQ(adaptive=False, smoothing_strength=0.5), weight, statistics)
    expected = (statistics.channel_max / weight.abs().amax(0)).sqrt()
    torch.testing.assert_close(fixed.factor, expected)


def test_auto_is_static_where_rows_are_alike_and_dynamic_where_they_are_not():
    weight = torch.randn(20, K)
    even = torch.rand(500, K) * 2 - 1
    uneven = even * torch.logspace(-3, 2, 500)[:, None]
    for x, scheme in ((even, "static"), (uneven, "token")):
        # Of so many tokens that hardly any is expected beyond the range of these.
        statistics = InputStatistics(1_000_000, x.abs().amax(0), x.t() @ x / 500, None, x, torch.full((500,), 2e3))
        statistics.sensitivity = uniform_sensitivity(weight / x.std())  # errors count relative to the input's size
        assert HAQ(activations="auto", auto_limit=1e-2).activation(weight, statistics).scheme == scheme


def test_auto_gives_an_expert_its_share_of_the_limit():
    weight, x = torch.randn(20, K), torch.randn(500, K)
    statistics = InputStatistics(500, x.abs().amax(0), x.t() @ x / 500, None, x, torch.ones(500))
    cost = uniform_sensitivity(weight).channels
    added = (best_static_scale(statistics, cost)[1] - float(dynamic_noise(statistics, per_row=True) @ cost)) / 2
    for share, scheme in ((1.0, "static"), (0.51, "static"), (0.49, "token")):
        quantizer = HAQ(activations="auto", auto_limit=2 * added)
        assert quantizer.activation(weight, replace(statistics, share=share)).scheme == scheme


def test_auto_needs_the_sensitivity():
    with pytest.raises(UserError, match="auto needs the sensitivity, but"):
        HAQ(activations="auto", sensitivity=0)


def test_insensitive_channels_may_be_rounded_coarsely():
    """A channel whose errors cost nothing does not decide the factor or the scale."""
    weight, x = torch.randn(20, K), torch.randn(600, K)
    x[:, 0] *= 1000
    statistics = InputStatistics(len(x), x.abs().amax(0), x.t() @ x / len(x), None, x, torch.ones(len(x)))
    alike = HAQ(activations="static").activation(weight, statistics)
    statistics.sensitivity = uniform_sensitivity(weight)
    statistics.sensitivity.channels[0] = 0
    assert HAQ(activations="static").activation(weight, statistics).scale < alike.scale / 10


def test_scale_search_never_raises_its_error_and_helps_at_four_bits():
    weight = torch.randn(30, K)
    weight[:, 5] *= 8
    statistics, _ = outliers()
    error = {
        search: output_error(
            weight,
            HAQ(weight_bits=4, scale_search=search).solve(weight, statistics, ActivationChoice("token")),
            statistics.hessian,
        )
        for search in (False, True)
    }
    assert error[True] < error[False]


def test_asymmetric_calibration_corrects_a_drifted_input():
    weight, (statistics, x) = torch.randn(20, K), outliers(cross=True)
    wanted = 1.02 * x @ weight.t()

    def error(quantizer: HAQ) -> float:
        solution: Solution = quantizer.solve(weight, statistics, ActivationChoice("token"))
        return float((x @ (solution.levels.float() * solution.scale[:, None]).t() - wanted).square().mean())

    assert HAQ(asymmetric_calibration=True).needs.cross
    without, _ = outliers()
    plain = HAQ().solve(weight, without, ActivationChoice("token"))
    plain_error = float((x @ (plain.levels.float() * plain.scale[:, None]).t() - wanted).square().mean())
    assert error(HAQ(asymmetric_calibration=True)) < plain_error


def test_a_hessian_without_a_factor_falls_back_to_rounding_with_a_note():
    weight, (statistics, _) = torch.randn(20, K), outliers()
    statistics.hessian = torch.full((K, K), torch.nan)
    solution = HAQ().solve(weight, statistics, ActivationChoice("token"))
    assert solution.notes == {"fallback": "rtn"}
    assert torch.equal(solution.levels.float(), (weight / solution.scale[:, None]).round())


def test_asymmetric_calibration_trusts_a_quarter_of_the_drift():
    """Against the correction in float64: W + W (C/4 - N) (H + N + damp)^-1, N the noise of the rounded activations."""
    weight, (statistics, x) = torch.randn(20, K), outliers(cross=True)
    levels, scale = quantize_activations(x, "token", None)
    noise = torch.diag((levels.double() * scale - x.double()).square().mean(0))
    hessian = statistics.shrunk_hessian().double() + noise
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K)
    cross = statistics.cross.double() / 4 - noise
    target = weight.double() + weight.double() @ cross @ torch.linalg.inv(damped)
    solution = HAQ(asymmetric_calibration=True).solve(weight, statistics, ActivationChoice("token"))
    wanted = HAQ().solve(
        target.float(), replace(statistics, cross=None, hessian=hessian.float()), ActivationChoice("token")
    )
    torch.testing.assert_close(solution.scale, wanted.scale, rtol=1e-4, atol=0)
