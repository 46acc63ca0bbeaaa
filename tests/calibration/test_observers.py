"""Test that experts are calibrated on their routed tokens, or on the layer's if those are too few."""

from __future__ import annotations

import pytest
import torch

from haq_lab.calibration.hooks import captured_inputs, observe
from haq_lab.calibration.observers import ExpertInside, ExpertsInput
from haq_lab.calibration.statistics import CalibrationPolicy, Needs
from haq_lab.models import layerwise as layered
from haq_lab.routing.choices import Routing
from haq_lab.utils.timer import Stopwatch
from tests.models.test_layerwise import whole_of

NEEDS = Needs(inputs=True, hessian=True, sample=True)
pytestmark = pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(layered, "TOKENS_PER_BATCH", 96)  # two windows of 48, so that five come in 2, 2 and 1


def moe_input(model, layer, hidden):
    """Return the router's inputs (tokens, d) and its chosen experts (tokens, k)."""
    with captured_inputs(layer, ["mlp.gate"]) as seen:
        model.forward(layer, 0, hidden)
    x = seen["mlp.gate"][0].reshape(-1, hidden.shape[-1])
    return x, layer.mlp.gate(x)[2]


def watch(model, layer, hidden, policy, inputs_fp=None, needs=NEEDS):
    routing = Routing(model.experts, model.kinds.moe_layers, tuple(hidden.shape[:2]))
    group = next(group for group in model.groups_of(0) if group.float_consumers)
    watcher = ExpertsInput(
        layer, group, needs, "mlp.experts", hidden.shape[0] * hidden.shape[1], inputs_fp, policy, routing
    )
    observe(model, layer, 0, hidden, [watcher], Stopwatch())
    return watcher.finish(), routing


def hessian(x):
    return x.t() @ x / len(x)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_each_experts_own_tokens(tiny, windows):
    layer, hidden = tiny.load_layer(0), tiny.embed(windows)
    x, chosen = moe_input(tiny, layer, hidden)
    statistics, routing = watch(tiny, layer, hidden, CalibrationPolicy(min_tokens=25))
    close(statistics.hessian, hessian(x))
    counts = routing.counts(0)
    assert counts.sum() == 2 * windows.numel()
    assert (counts < 25).any()
    assert (counts >= 25).any()
    for expert in range(tiny.experts):
        own = x[(chosen == expert).any(dim=1)]
        got = statistics.of(expert)
        assert len(own) == counts[expert]
        assert got.stands_in == (len(own) < 25)
        close(got.hessian, hessian(x if got.stands_in else own))
        torch.testing.assert_close(got.channel_max, (x if got.stands_in else own).abs().amax(0))
    factor = torch.rand(x.shape[1]) + 0.5
    expert = int(counts.argmax())
    close(statistics.divided_by(factor).of(expert).hessian, hessian(x[(chosen == expert).any(dim=1)] / factor))


def test_all_tokens(tiny, windows):
    layer, hidden = tiny.load_layer(0), tiny.embed(windows)
    statistics, routing = watch(tiny, layer, hidden, CalibrationPolicy(route="all"))
    assert statistics.routed == {}
    assert all(statistics.of(expert) is statistics for expert in range(tiny.experts))
    assert len(routing.chosen) == 1


def test_cross_moments_are_of_the_same_tokens(tiny, windows):
    layer, hidden = tiny.load_layer(0), tiny.embed(windows)
    x, chosen = moe_input(tiny, layer, hidden)
    x_fp = x + 0.1 * torch.randn_like(x)
    needs = Needs(inputs=True, hessian=True, cross=True)
    statistics, _ = watch(tiny, layer, hidden, CalibrationPolicy(min_tokens=1), x_fp, needs)
    expert = int(chosen.flatten().mode().values)
    own = (chosen == expert).any(dim=1)
    close(statistics.cross, (x_fp - x).t() @ x / len(x))
    close(statistics.of(expert).cross, (x_fp - x)[own].t() @ x[own] / int(own.sum()))


def test_the_trace_is_the_whole_models(tiny, windows):
    whole, seen = whole_of(tiny.folder), []
    router = whole.get_submodule(f"{tiny.family.layers}.0.{tiny.family.moe.router}")
    router.register_forward_hook(lambda module, arguments, output: seen.append(output))
    whole(windows)
    _, weights, chosen = seen[0]
    _, routing = watch(tiny, tiny.load_layer(0), tiny.embed(windows), CalibrationPolicy())
    assert torch.equal(routing.chosen[0].long(), chosen)
    torch.testing.assert_close(routing.weights[0].float(), weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("few", [False, True])
def test_inside_an_expert(tiny, windows, few, monkeypatch):
    monkeypatch.setattr("haq_lab.calibration.observers.TOKENS_PER_CHANNEL", 1)  # so that not all tokens are added
    layer, hidden = tiny.load_layer(0), tiny.embed(windows)
    x, chosen = moe_input(tiny, layer, hidden)
    counts = chosen.flatten().bincount(minlength=tiny.experts)
    for expert in range(tiny.experts):
        group = next(group for group in tiny.groups_of(0) if group.expert == expert)
        channels = layer.get_submodule(group.site).weight.shape[1]
        stride = max(1, len(x) // channels)
        watcher = ExpertInside(layer, group, NEEDS, "mlp.experts", len(x), counts, few)
        observe(tiny, layer, 0, hidden, [watcher], Stopwatch())
        statistics = watcher.finish()
        own = layer.mlp.experts[expert].activate(x[(chosen == expert).any(dim=1)])
        if few:
            own = torch.cat([own, layer.mlp.experts[expert].activate(x[::stride])])
        assert statistics.stands_in == few
        assert statistics.count == len(own)
        assert statistics.share == int(counts[expert]) / len(chosen.flatten())
        if len(own):
            close(statistics.hessian, hessian(own))
            torch.testing.assert_close(statistics.channel_max, own.abs().amax(0), rtol=1e-4, atol=1e-5)
