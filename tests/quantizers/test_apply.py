"""Linears give way to int8 linears with the same names, biases and rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from haq_lab.calibration.observe import observe
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear, to_float
from haq_lab.quantizers.apply import quantize_group, smooth_group
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothquant import SmoothQuant

BACKEND = ReferenceBackend()


def test_every_linear_is_replaced_in_place(tiny):
    layer, original = tiny.load_layer(0), tiny.load_layer(0)
    reports = [r for group in tiny.groups for r in quantize_group(layer, 0, group, RTN(), None, None, BACKEND)]
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
    layer, group = tiny.load_layer(0), tiny.groups[0]
    quantizer = GPTQ(activations=scheme, weight_bits=4)
    seen = observe(tiny, layer, 0, tiny.embed(windows), ["self_attn.q_proj"], quantizer.needs)["self_attn.q_proj"]
    reports = quantize_group(layer, 3, group, quantizer, seen, 0.25, BACKEND)
    assert [report.linear for report in reports] == list(group.consumers)
    for report in reports:
        assert (report.layer, report.scheme, report.strength) == (3, scheme, 0.25)
        assert 0 < report.error < report.error_rtn
        assert report.notes["damp"] == 0.01
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
    group, quantizer, hidden = tiny.groups[0], SmoothQuant(), tiny.embed(windows)
    site = group.consumers[0]
    before = observe(tiny, layer, 0, hidden, [site], GPTQ().needs)[site]
    after, strength = smooth_group([layer, twin], group, tiny.family, quantizer, before)
    assert strength == tiny.family.smoothquant_strength
    seen = observe(tiny, layer, 0, hidden, [site], GPTQ().needs)[site]
    torch.testing.assert_close(after.channel_max, seen.channel_max, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.hessian, seen.hessian, rtol=1e-3, atol=1e-4 * float(seen.hessian.abs().max()))
    assert all(torch.equal(x, y) for x, y in zip(layer.parameters(), twin.parameters(), strict=True))
    assert float(after.channel_max.max() / after.channel_max.median()) < float(
        before.channel_max.max() / before.channel_max.median()
    )
