"""The one pass gives what whole models give: at full precision transformers' own, quantised the assembled one's."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from haq_lab.calibration.statistics import MIN_TOKENS, CalibrationPolicy
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothquant import SmoothQuant
from haq_lab.storage.tensor_names import expert_of
from tests.models.test_layerwise import whole_of

QUANTIZERS = {
    "rtn": RTN(),
    "rtn_static": RTN(activations="static"),
    "smoothquant": SmoothQuant(),
    "gptq4": GPTQ(weight_bits=4),
}


def pass_through(model, quantizer, windows, inputs="fp"):
    layers: dict[int, nn.Module] = {}
    calibration = windows.flip(0).flip(1)
    result = sequential_pass(
        PassInputs(model, quantizer, ReferenceBackend(), calibration, CalibrationPolicy(inputs), {"text": windows}),
        layers.__setitem__,
    )
    assert list(layers) == list(range(model.depth))
    return result, list(layers.values())


def test_full_precision_is_the_models_own(tiny, windows):
    result, layers = pass_through(tiny, None, windows)
    assert set(result.hidden["text"]) == {"fp"}
    assert not result.reports
    expected = whole_of(tiny.folder)(windows).logits
    torch.testing.assert_close(tiny.head(result.hidden["text"]["fp"]), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(tiny.assemble(layers)(windows).logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("inputs", ["fp", "quantized"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_levels(tiny, windows, name, inputs):
    result, layers = pass_through(tiny, QUANTIZERS[name], windows, inputs)
    logits = {level: tiny.head(hidden) for level, hidden in result.hidden["text"].items()}
    expected = whole_of(tiny.folder)(windows).logits
    torch.testing.assert_close(logits["fp"], expected, rtol=1e-5, atol=1e-4)
    assert float((logits["smoothed"] - expected).norm() / expected.norm()) < 1e-4
    shared = result.hidden["text"]["smoothed"] is result.hidden["text"]["fp"]
    assert shared == (name != "smoothquant"), "a method that does not smooth runs no second full-precision model"

    whole = tiny.assemble(layers)
    linears = [module for module in whole.get_submodule(tiny.family.layers).modules() if isinstance(module, Int8Linear)]
    assert len(linears) == len(result.reports) == tiny.depth * sum(len(group.consumers) for group in tiny.groups_of(0))
    # A level may tip at a tie where batches round differently; it stays far below what quantization changes.
    quantized = torch.cat([whole(window[None]).logits for window in windows])
    apart = float((logits["quantized"] - expected).norm())
    assert float((logits["quantized"] - quantized).norm()) < 0.02 * apart
    # Where a token's experts change, so does its output, by far more than rounding.
    coarse = name == "gptq4" or (name == "rtn_static" and tiny.experts)
    assert 0 < apart / float(expected.norm()) < (0.9 if coarse else 0.35)


def test_propagating_the_quantised_model_gives_other_statistics(tiny, windows):
    scales = {}
    for inputs in ("fp", "quantized"):
        result, _ = pass_through(tiny, RTN(activations="static", weight_bits=4), windows, inputs)
        scales[inputs] = {(report.layer, report.linear): report.static_scale for report in result.reports}
    first = (0, tiny.groups_of(0)[0].consumers[0])
    assert scales["fp"][first] == pytest.approx(scales["quantized"][first])
    assert scales["fp"] != scales["quantized"]


def test_nothing_to_evaluate_still_quantises(tiny, windows):
    layers: list[nn.Module] = []
    result = sequential_pass(
        PassInputs(tiny, RTN(), ReferenceBackend(), None, CalibrationPolicy(), {}),
        lambda index, layer: layers.append(layer),
    )
    assert result.hidden == {}
    assert len(layers) == tiny.depth
    assert result.stopwatch.seconds["solve"] > 0


@pytest.mark.parametrize("architecture", ["mixtral"])
def test_routing_is_recorded_and_counted(tiny, windows):
    result, layers = pass_through(tiny, GPTQ(), windows, "quantized")
    assert all(isinstance(layer.mlp.experts, Int8Experts) for layer in layers)
    assert len(result.routing.chosen) == tiny.depth
    tokens = {(row.layer, row.expert): row.tokens for row in result.routing.table().itertuples()}
    for report in result.reports:
        expert = expert_of(report.linear)
        assert report.notes.get("tokens") == (None if expert is None else tokens[report.layer, expert])
        fallback = expert is not None and tokens[report.layer, expert] < MIN_TOKENS
        assert report.notes.get("fallback") == ("shared" if fallback else None)
    calibration = windows.flip(0).flip(1)
    seen: list[torch.Tensor] = []
    layers[1].mlp.gate.register_forward_hook(lambda module, arguments, output: seen.append(output[2]))
    tiny.assemble(layers)(calibration)
    apart = (result.routing.chosen[1].long() != seen[0]).float().mean()
    assert apart < 0.02, "the deployed model routes as recorded, but for near ties"


@pytest.mark.parametrize("name", ["rtn", "gptq4"])
def test_nothing_keeps_a_layers_weights_once_it_is_finished(tiny, windows, name):
    """One layer is in memory at a time, whatever the depth: neither the float weights nor the finished layer stay."""
    loaded: list[weakref.ref] = []
    original = tiny.load_layer

    def load(index):
        assert not [reference for reference in loaded if reference() is not None]
        layer = original(index)
        loaded.extend(weakref.ref(parameter) for parameter in layer.parameters())
        return layer

    tiny.load_layer = load
    calibration = windows.flip(1)
    evaluation = {"text": windows}
    policy = CalibrationPolicy()
    sequential_pass(
        PassInputs(tiny, QUANTIZERS[name], ReferenceBackend(), calibration, policy, evaluation),
        lambda index, layer: None,
    )
    assert len(loaded) > 10


def test_hidden_states_in_files_change_nothing(tiny, windows, monkeypatch):
    in_ram, _ = pass_through(tiny, GPTQ(), windows, "quantized")
    monkeypatch.setattr("haq_lab.storage.hidden_state_buffer.RAM_BYTES", 100_000)
    in_files, _ = pass_through(tiny, GPTQ(), windows, "quantized")
    for level, hidden in in_ram.hidden["text"].items():
        assert torch.equal(in_files.hidden["text"][level], hidden)
