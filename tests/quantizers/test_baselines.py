"""Test that RTN, SmoothQuant and GPTQ do what was published."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.quantizers.awq import AWQ
from haq_lab.quantizers.base import ActivationChoice, Solution, output_error
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothing import ChannelMap
from haq_lab.quantizers.smoothquant import SmoothQuant
from haq_lab.utils.errors import UserError

TOKEN = ActivationChoice("token")


def statistics(channels: int) -> tuple[InputStatistics, torch.Tensor]:
    x = torch.randn(300, channels) * torch.logspace(-1, 1, channels)
    return InputStatistics(300, x.abs().amax(0), x.t() @ x / 300), x


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_rtn_is_max_over_127_to_nearest(bits, top):
    weight = torch.randn(5, 20)
    solution = RTN(weight_bits=bits).solve(weight, None, TOKEN)
    scale = weight.abs().amax(dim=1) / top
    torch.testing.assert_close(solution.scale, scale)
    assert torch.equal(solution.levels.float(), (weight / scale[:, None]).round())


def test_needs_of_each_quantizer():
    assert not RTN().needs.inputs
    assert RTN(activations="static").needs.inputs
    assert SmoothQuant().needs.inputs
    assert not SmoothQuant().needs.hessian
    assert GPTQ().needs.hessian
    assert not GPTQ().needs.sample


def test_static_scale_covers_the_largest_activation():
    seen, x = statistics(8)
    choice = RTN(activations="static").activation(torch.randn(3, 8), seen)
    assert choice.scheme == "static"
    assert float(choice.scale) == pytest.approx(float(x.abs().max()) / 127)
    for scheme in ("token", "tensor"):
        assert RTN(activations=scheme).activation(torch.randn(3, 8), None) == ActivationChoice(scheme)


def test_smoothquant_smooths_only_norms_with_the_familys_strength(tiny):
    layer = tiny.load_layer(0)
    strength = {"opt": 0.5, "llama": 0.85}.get(tiny.family.model_type, 0.8)
    for group in tiny.groups_of(0):
        weight = torch.cat([layer.get_submodule(name).weight for name in group.readers])
        seen, x = statistics(weight.shape[1])
        channels = ChannelMap(group, layer, weight.shape[1])
        smoothing = SmoothQuant().smoothing(group, tiny.family, weight, seen, channels)
        if group.kind != "norm":
            assert smoothing is None
            continue
        assert smoothing.strength == strength
        expected = x.abs().amax(0) ** strength / weight.abs().amax(0) ** (1 - strength)
        torch.testing.assert_close(smoothing.factor, expected)
        assert SmoothQuant(smoothing_strength=0.3).smoothing(group, tiny.family, weight, seen, channels).strength == 0.3


def test_gptq_has_a_smaller_output_error_than_rtn_with_the_same_scale():
    seen, _ = statistics(48)
    seen.hessian[5] = seen.hessian[:, 5] = 0
    weight = torch.randn(64, 48)
    solution = GPTQ(weight_bits=4).solve(weight, seen, TOKEN)
    nearest = RTN(weight_bits=4).solve(weight, seen, TOKEN)
    assert torch.equal(solution.scale, nearest.scale)
    assert output_error(weight, solution, seen.hessian) < output_error(weight, nearest, seen.hessian)
    assert solution.notes == {"dampening_frac": 0.01, "dead_columns": 1}


def test_awq_takes_the_factor_with_the_least_output_error(tiny):
    seen, _ = statistics(64)
    weight, layer, group = torch.randn(48, 64), tiny.load_layer(0), tiny.groups_of(0)[0]
    factor = AWQ().smoothing(group, tiny.family, weight, seen, ChannelMap(group, layer, 64))

    def error(strength: float) -> float:
        own = seen.hessian.diagonal() ** (strength / 2)
        own = own / (own.max() * own.min()).sqrt()
        scaled = weight * own
        return output_error(scaled, RTN().solve(scaled, None, TOKEN), seen.divided_by(own).hessian)

    assert 0 < factor.strength < 1
    assert error(factor.strength) == pytest.approx(min(error(step / 20) for step in range(20)), rel=1e-5)
    torch.testing.assert_close(factor.factor.max() * factor.factor.min(), torch.tensor(1.0))


def test_output_error_is_the_mean_square_of_the_outputs():
    seen, x = statistics(16)
    weight = torch.randn(6, 16)
    solution = RTN(weight_bits=4).solve(weight, None, TOKEN)
    error = x @ (solution.levels.float() * solution.scale[:, None] - weight).t()
    assert output_error(weight, solution, seen.hessian) == pytest.approx(float(error.square().mean()), rel=1e-4)
    exact = Solution(torch.tensor([[3, -4]], dtype=torch.int8), torch.tensor([0.5]))
    assert output_error(torch.tensor([[1.5, -2.0]]), exact, torch.eye(2)) == 0


@pytest.mark.parametrize(
    ("quantizer", "setting"),
    [
        (RTN, {"activations": "row"}),
        (RTN, {"weight_bits": 3}),
        (RTN, {"weight_bits": 4, "group": 48}),
        (RTN, {"weight_bits": "auto"}),
        (HAQ, {"weight_bits": "auto", "bits": 3}),
        (SmoothQuant, {"smoothing_strength": 1.5}),
        (GPTQ, {"dampening_frac": 0}),
        (GPTQ, {"dampening_frac": -1}),
    ],
)
def test_settings_that_are_refused(quantizer, setting):
    with pytest.raises(ValidationError):
        quantizer(**setting)


@pytest.mark.parametrize(
    ("quantizer", "settings", "message"),
    [
        (RTN, {"group": 64}, r"quantizer.group: 64 needs 4-bit weights"),
        (HAQ, {"group": 64}, r"quantizer.group: 64 needs 4-bit weights"),
        (HAQ, {"weight_bits": "auto", "sensitivity": 0}, r"quantizer.weight_bits: auto needs the sensitivity"),
    ],
)
def test_combinations_that_are_refused(quantizer, settings, message):
    with pytest.raises(UserError, match=message):
        quantizer(**settings)


@pytest.mark.parametrize("quantizer", [RTN, SmoothQuant, GPTQ, HAQ])
def test_smaller_groups_have_a_smaller_error(quantizer):
    weight, (seen, _) = torch.randn(20, 200), statistics(200)
    errors = []
    for group in ("none", 128, 64, 32):
        solution = quantizer(weight_bits=4, group=group).solve(weight, seen, TOKEN)
        assert solution.format == WeightFormat(4, None if group == "none" else group)
        assert solution.scale.shape == solution.format.scale_shape(20, 200)
        assert solution.levels.abs().max() == 7
        errors.append(output_error(weight, solution, seen.hessian))
    assert errors == sorted(errors, reverse=True)


def test_bytes_of_a_weight():
    assert RTN().bytes_per_weight == 1
    assert RTN(weight_bits=4, group=64).bytes_per_weight == 0.5625
    assert HAQ(weight_bits="auto", bits=5, group=32).bytes_per_weight == 0.75
    assert HAQ(weight_bits="auto", group=32).with_bits(8) == HAQ()
