"""Test that observers receive the inputs of the linears in every batch, and that the layer is unchanged."""

from __future__ import annotations

import pytest
import torch

from haq_lab.calibration.hooks import captured_inputs, observe, record_inputs
from haq_lab.calibration.observers import SharedInput
from haq_lab.calibration.statistics import Needs
from haq_lab.models import layerwise as layered
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.utils.timer import Stopwatch
from tests.models.test_layerwise import VARIANTS, save, whole_of

NEEDS = Needs(inputs=True, hessian=True, cross=True)


@pytest.fixture(params=["opt", "llama", "opt_post_norm"])
def model(request, tmp_path) -> LayeredModel:
    """Both tiny models, and one whose queries read the residual stream itself."""
    if request.param in VARIANTS:
        return LayeredModel(save(VARIANTS[request.param], tmp_path))
    return LayeredModel(TinyModel(request.param).folder())


def transformers_inputs(model: LayeredModel, index: int, windows) -> dict[str, torch.Tensor]:
    """The inputs of all linears of layer `index` within transformers' own model, (n * t, k)."""
    whole, inputs = whole_of(model.folder), {}
    layer = whole.get_submodule(f"{model.family.layers}.{index}")
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, arguments, name=name: inputs.update({name: arguments[0].flatten(0, -2).clone()})
            )
    whole(windows)
    return inputs


def statistics_of(model, layer, index, hidden, needs, inputs_fp=None):
    """Statistics of each group's input, by the first linear that reads it."""
    tokens = hidden.shape[0] * hidden.shape[1]
    fp = inputs_fp or {}
    watchers = [SharedInput(layer, group, needs, tokens, fp.get(group.site)) for group in model.groups_of(0)]
    observe(model, layer, index, hidden, watchers, Stopwatch())
    return {watcher.group.site: watcher.finish() for watcher in watchers}


def test_statistics_match_the_linears_of_the_whole_model(model, windows, monkeypatch):
    monkeypatch.setattr(layered, "TOKENS_PER_BATCH", 96)
    hidden = model.embed(windows)
    model.run(model.load_layer(0), 0, hidden)
    layer, before = model.load_layer(1), hidden.clone()
    statistics = statistics_of(model, layer, 1, hidden, NEEDS)
    assert torch.equal(hidden, before)
    expected = transformers_inputs(model, 1, windows)
    for group in model.groups_of(0):
        for name in group.consumers:  # they share the first one's
            x = expected[name]
            got = statistics[group.consumers[0]]
            assert got.count == windows.numel()
            torch.testing.assert_close(got.channel_max, x.abs().amax(0), rtol=1e-4, atol=1e-5)
            hessian = x.t() @ x / len(x)
            torch.testing.assert_close(got.hessian, hessian, rtol=1e-3, atol=1e-4 * float(hessian.abs().max()))


def test_record_inputs_keeps_them_and_advances(model, windows, monkeypatch):
    monkeypatch.setattr(layered, "TOKENS_PER_BATCH", 96)
    hidden = model.embed(windows)
    layer = model.load_layer(0)
    advanced = model.run(layer, 0, hidden.clone())
    sites = [group.consumers[0] for group in model.groups_of(0)]
    recorded = record_inputs(model, layer, 0, hidden, sites)
    assert torch.equal(hidden, advanced)
    expected = transformers_inputs(model, 0, windows)
    for site in sites:
        torch.testing.assert_close(recorded[site], expected[site], rtol=1e-4, atol=1e-4)


def test_cross_moment_uses_the_same_rows(model, windows, monkeypatch):
    monkeypatch.setattr(layered, "TOKENS_PER_BATCH", 96)
    site = model.groups_of(0)[1].consumers[0]
    layer = model.load_layer(0)
    hidden_fp = model.embed(windows)
    hidden = hidden_fp + 0.01 * torch.randn_like(hidden_fp)
    x_fp = record_inputs(model, layer, 0, hidden_fp, [site])
    statistics = statistics_of(model, layer, 0, hidden, NEEDS, x_fp)[site]
    x = record_inputs(model, layer, 0, hidden, [site])[site]
    expected = (x_fp[site] - x).t() @ x / len(x)
    torch.testing.assert_close(statistics.cross, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_stops_early_and_removes_its_hooks(model, windows):
    layer, site = model.load_layer(0), model.groups_of(0)[0].consumers[0]
    hidden, reached = model.embed(windows), []
    layer.get_submodule(model.groups_of(0)[-1].consumers[0]).register_forward_hook(lambda *_: reached.append(1))
    with captured_inputs(layer, [site], stop=True) as inputs:
        model.forward(layer, 0, hidden)
    assert inputs[site][0].shape[-1] == 64
    assert not reached
    assert not layer.get_submodule(site)._forward_pre_hooks
    model.forward(layer, 0, hidden)
    assert reached


def test_an_error_in_the_layer_is_not_swallowed(model, windows):
    layer = model.load_layer(0)
    with pytest.raises(ZeroDivisionError), captured_inputs(layer, [model.groups_of(0)[0].consumers[0]], stop=True):
        raise ZeroDivisionError
    assert not layer.get_submodule(model.groups_of(0)[0].consumers[0])._forward_pre_hooks


def test_the_layers_own_arguments_are_captured(model, windows):
    model.embed(windows)
    arguments = model._arguments_for(windows.shape[1])
    assert len(arguments) == model.depth
    names = set(arguments[0])
    assert "attention_mask" in names
    assert ("position_embeddings" in names) == (model.family.model_type == "llama")
