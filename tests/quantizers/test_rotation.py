"""Test that rotations keep a model's function and its routing, and that statistics follow them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from haq_lab.calibration.hooks import captured_inputs
from haq_lab.calibration.statistics import Accumulator, InputStatistics, Needs
from haq_lab.int8.backend import FakeBackend, ReferenceBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.rotation import rotate
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.quantizers.apply import quantize_group, smooth_group
from haq_lab.quantizers.base import ActivationChoice, Smoothing, Solution
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.haq.noise import best_static_scale
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothing import ChannelMap
from tests.quantizers.test_haq import UP
from tests.quantizers.test_smoothing import RandomFactors, relative


class Unrounded(RandomFactors):
    """Smooths and rotates every input, but keeps the weights as they are."""

    def __init__(self, rotation: str, block: int = 128):
        super().__init__()
        object.__setattr__(self, "rotation", rotation)
        object.__setattr__(self, "rotation_block", block)

    def smoothing(self, group, family, weight, statistics, channels):
        """Factors over two orders of magnitude: sums of more unlike channels are not exact to 1e-4 in float32."""
        return Smoothing(channels.shared_max(10 ** (2 * torch.rand(weight.shape[1]) - 1)), 0.5)

    def solve(self, weight: Tensor, statistics: InputStatistics | None, activation: ActivationChoice) -> Solution:
        return Solution(weight, torch.ones(len(weight)))


class UnroundedBackend(FakeBackend):
    """Rotates activations, but does not round them."""

    def quantize(self, x, scheme, static_scale, sequences=None, rotation=1):
        return rotate(x, rotation), torch.ones(len(x), 1)


def rotated_layers(model, quantizer, backend):
    layers = [model.load_layer(index) for index in range(model.depth)]
    for index, layer in enumerate(layers):
        for group in model.groups_of(index):
            smooth_group([layer], group, model.family, quantizer, None)
            quantize_group(layer, index, group, quantizer, None, None, backend)
        if (moe := model.moe_of(index)) is not None:
            layer.set_submodule(moe.experts, Int8Experts.of(layer.get_submodule(moe.experts)))
    return layers


@pytest.mark.parametrize(("rotation", "block"), [("block", 8), ("full", 128)])
def test_the_function_is_preserved(tiny, windows, logits_of, rotation, block):
    before = logits_of(tiny, [tiny.load_layer(index) for index in range(tiny.depth)], windows)
    layers = rotated_layers(tiny, Unrounded(rotation, block), UnroundedBackend())
    linears = [module for layer in layers for module in layer.modules() if isinstance(module, Int8Linear)]
    assert min(linear.rotation for linear in linears) > 1
    assert rotation == "full" or {linear.rotation for linear in linears} == {8}
    assert relative(logits_of(tiny, layers, windows) - before, before) < 1e-4


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_router_reads_the_unrotated_input(tiny, windows):
    """Of two layers that differ in the rotation only, the routers receive the same input, and choose alike."""
    hidden, seen = tiny.embed(windows), []
    for rotation in ("none", "full"):
        torch.manual_seed(0)  # the same factors
        layer = rotated_layers(tiny, Unrounded(rotation), UnroundedBackend())[0]
        with captured_inputs(layer, ["mlp.gate"]) as inputs:
            tiny.forward(layer, 0, hidden)
        (x,) = inputs["mlp.gate"]
        seen.append((x, layer.mlp.gate(x)[2]))
    assert layer.mlp.experts.rotation > 1
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-3, atol=1e-4)
    assert torch.equal(seen[0][1], seen[1][1])


def test_statistics_are_those_of_the_rotated_input():
    x, x_fp = torch.randn(500, 48), torch.randn(500, 48)

    def statistics(x, x_fp):
        accumulator = Accumulator(48, len(x), Needs(inputs=True, hessian=True, cross=True, sample=True))
        accumulator.add(x, x_fp)
        return accumulator.finish()

    got, wanted = statistics(x, x_fp).rotated(16), statistics(rotate(x, 16), rotate(x_fp, 16))
    torch.testing.assert_close(got.hessian, wanted.hessian, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.cross, wanted.cross, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.channel_max, wanted.channel_max)
    assert torch.equal(got.sample[:500], rotate(x, 16))
    assert got.rotated(1) is got


def test_without_a_sample_the_largest_values_are_bounds():
    x = torch.randn(500, 48)
    bound = InputStatistics(500, x.abs().amax(0)).rotated(16).channel_max
    assert (rotate(x, 16).abs() <= bound * (1 + 1e-6)).all()
    row = bound.clone()
    row[:] = x.abs().amax(0)  # a row that reaches them
    torch.testing.assert_close(rotate(row, 16)[::16], bound[::16])


def test_experts_statistics_are_rotated_too():
    x = torch.randn(99, 32)
    shared = InputStatistics(99, x.abs().amax(0), x.t() @ x / 99)
    shared.routed[3] = replace(shared, hessian=2 * shared.hessian, routed={})
    rotated = shared.rotated(32)
    torch.testing.assert_close(rotated.of(3).hessian, 2 * rotated.hessian)


def test_weights_are_solved_for_the_rotated_input(tiny):
    layer, group = tiny.load_layer(0), tiny.groups_of(0)[0]
    weight = layer.get_submodule(group.consumers[0]).weight.clone()
    quantize_group(layer, 0, group, RTN(rotation="block", rotation_block=16), None, None, ReferenceBackend())
    linear = layer.get_submodule(group.consumers[0])
    assert linear.rotation == 16
    wanted = RTN().solve(rotate(weight, 16), None, ActivationChoice("token"))
    assert torch.equal(linear.weight, wanted.levels)
    assert torch.equal(linear.weight_scale, wanted.scale)


@pytest.mark.parametrize("quantizer", [RTN, GPTQ])
def test_a_rotated_static_scale_needs_a_sample(quantizer):
    assert quantizer(activations="static", rotation="full").needs.sample
    assert not quantizer(activations="static").needs.sample
    assert not quantizer(rotation="full").needs.sample


def test_haq_rotates_by_default_and_can_do_without():
    assert [HAQ().rotation_of(width) for width in (576, 1536)] == [64, 128]
    assert HAQ(rotation="full").rotation_of(1536) == 512
    assert HAQ(rotation="none").rotation_of(1536) == 1


def test_factor_and_rotation_together_leave_the_least_error():
    """Outliers of some channels, and of some tokens in all channels: the factor finds the first, the rotation both."""
    x = torch.randn(800, 128)
    x[:, :4] *= 200
    x[:, 20:60] *= torch.randn(800, 40).exp()
    weight = torch.randn(30, 128)
    statistics = InputStatistics(800, x.abs().amax(0), x.t() @ x / 800, None, x, torch.ones(800))

    def error(smooth: bool, block: int) -> float:
        factor = torch.ones(128)
        if smooth:
            layer, group = torch.nn.Module(), UP
            layer.up, layer.down = torch.nn.Linear(8, 128), torch.nn.Linear(128, 8)
            factor = HAQ().smoothing(group, None, weight, statistics, ChannelMap(group, layer, 128)).factor
        seen = statistics.divided_by(factor).rotated(block)
        rotated = rotate(weight * factor, block)
        return best_static_scale(seen, rotated.square().sum(0))[1]

    both = error(True, 128)
    assert both < 0.8 * error(True, 1)
    assert both < 0.8 * error(False, 128)
    assert error(False, 128) < error(False, 1)
