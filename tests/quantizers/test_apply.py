"""Test that linears are replaced by int8 linears with the same names, biases and rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from haq_lab.calibration.hooks import observe
from haq_lab.calibration.observers import SharedInput
from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear, to_float
from haq_lab.quantizers.apply import quantize_group, smooth_group
from haq_lab.quantizers.base import COLUMNS, ActivationChoice, Solution, output_error
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothquant import SmoothQuant
from haq_lab.utils.timer import Stopwatch

BACKEND = ReferenceBackend()


def seen_by(model, layer, group, hidden, needs):
    """Statistics of one group's input in layer 0."""
    watcher = SharedInput(layer, group, needs, hidden.shape[0] * hidden.shape[1], None)
    observe(model, layer, 0, hidden, [watcher], Stopwatch())
    return watcher.finish()


def test_every_linear_is_replaced_in_place(tiny):
    layer, original = tiny.load_layer(0), tiny.load_layer(0)
    reports = [r for group in tiny.groups_of(0) for r in quantize_group(layer, 0, group, RTN(), None, None, BACKEND)]
    assert not [module for module in layer.modules() if isinstance(module, nn.Linear)]
    linears = {name: module for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    assert sorted(report.linear for report in reports) == sorted(linears)
    for name, linear in linears.items():
        int8 = layer.get_submodule(name)
        assert isinstance(int8, Int8Linear)
        step = int8.weight_scale[:, None]
        assert ((to_float(int8) - linear.weight).abs() <= step * 0.5001).all()
        assert (int8.bias is None) == (linear.bias is None)
        if linear.bias is not None:
            assert torch.equal(int8.bias, linear.bias)
        assert int8.weight.untyped_storage().nbytes() == int8.weight.numel(), "no view into the stacked solution"


@pytest.mark.parametrize("scheme", ["token", "static"])
def test_reports(tiny, windows, scheme):
    layer, group = tiny.load_layer(0), tiny.groups_of(0)[0]
    quantizer = GPTQ(activations=scheme, weight_bits=4)
    seen = seen_by(tiny, layer, group, tiny.embed(windows), quantizer.needs)
    reports = quantize_group(layer, 3, group, quantizer, seen, 0.25, BACKEND)
    assert [report.linear for report in reports] == list(group.consumers)
    for report in reports:
        assert (report.layer, report.activation_scheme, report.smoothing_strength) == (3, scheme, 0.25)
        assert 0 < report.output_error < report.error_rtn
        assert report.notes["dampening_frac"] == 0.01
        linear = layer.get_submodule(report.linear)
        assert linear.scheme == scheme
        if scheme == "static":
            assert report.static_scale == pytest.approx(float(linear.input_scale))
            assert report.static_scale == pytest.approx(float(seen.channel_max.max()) / 127)
        else:
            assert report.static_scale is None
            assert linear.input_scale is None


def test_smoothing_returns_the_statistics_of_the_smoothed_input(tiny, windows):
    layer, twin = tiny.load_layer(0), tiny.load_layer(0)
    group, quantizer, hidden = tiny.groups_of(0)[0], SmoothQuant(), tiny.embed(windows)
    before = seen_by(tiny, layer, group, hidden, GPTQ().needs)
    after, strength = smooth_group([layer, twin], group, tiny.family, quantizer, before)
    assert strength == tiny.family.smoothquant_strength
    seen = seen_by(tiny, layer, group, hidden, GPTQ().needs)
    torch.testing.assert_close(after.channel_max, seen.channel_max, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.hessian, seen.hessian, rtol=1e-3, atol=1e-4 * float(seen.hessian.abs().max()))
    assert all(torch.equal(x, y) for x, y in zip(layer.parameters(), twin.parameters(), strict=True))
    assert float(after.channel_max.max() / after.channel_max.median()) < float(
        before.channel_max.max() / before.channel_max.median()
    )


@pytest.mark.parametrize("architecture", ["mixtral"])
def test_experts_use_their_own_statistics_and_share_one_activation_scheme(tiny):
    group = next(group for group in tiny.groups_of(0) if group.float_consumers)
    x = torch.randn(400, 64) * torch.logspace(-1, 1, 64)
    own = {e: InputStatistics(50, y.abs().amax(0), y.t() @ y / 50) for e, y in enumerate(x.split(50))}
    shared = InputStatistics(400, x.abs().amax(0), x.t() @ x / 400)
    shared.routed = own | {3: shared.standing_in()}
    layer, apart = tiny.load_layer(0), tiny.load_layer(0)
    quantizer = GPTQ(activations="static", weight_bits=4)
    reports = quantize_group(layer, 0, group, quantizer, shared, None, BACKEND)
    assert [report.linear for report in reports] == list(group.consumers)
    assert len({report.static_scale for report in reports}) == 1
    assert reports[0].static_scale == pytest.approx(float(x.abs().max()) / 127)
    assert {report.linear: report.notes.get("fallback") for report in reports if "fallback" in report.notes} == {
        f"mlp.experts.3.{name}_proj": "shared" for name in ("gate", "up")
    }
    assert isinstance(layer.mlp.gate.weight, nn.Parameter), "the router stays as it is"
    for expert in (0, 3):
        weight = torch.cat([apart.mlp.experts[expert].gate_proj.weight, apart.mlp.experts[expert].up_proj.weight])
        solution = quantizer.solve(weight, own[0] if expert == 0 else shared, ActivationChoice("token"))
        levels = torch.cat([layer.mlp.experts[expert].gate_proj.weight, layer.mlp.experts[expert].up_proj.weight])
        assert torch.equal(levels, solution.levels)


@pytest.mark.parametrize("architecture", ["mixtral"])
def test_a_hessian_without_a_factor_falls_back_to_rounding(tiny):
    group = next(group for group in tiny.groups_of(0) if group.expert == 2)
    broken = InputStatistics(9, torch.ones(96), torch.full((96, 96), float("nan")), stands_in=True)
    (report,) = quantize_group(tiny.load_layer(0), 0, group, GPTQ(), broken, None, BACKEND)
    assert report.notes["fallback"] == "rtn"


def test_the_output_error_is_the_trace_in_float64():
    """tr(dW H dW^T) / n over all blocks of H, those off the diagonal too."""
    k = 2 * COLUMNS + 44
    x, weight = torch.randn(500, k) @ torch.randn(k, k), torch.randn(6, k)
    hessian = x.t() @ x / len(x)
    solution = Solution(torch.randint(-127, 128, (6, k), dtype=torch.int8), torch.rand(6) * 0.01)
    difference = solution.levels.double() * solution.scale.double()[:, None] - weight.double()
    wanted = torch.einsum("nk,kl,nl->", difference, hessian.double(), difference) / 6
    assert output_error(weight, solution, hessian) == pytest.approx(float(wanted), rel=1e-4)
