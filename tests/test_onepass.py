"""The one pass gives what whole models give: at full precision transformers' own, quantised the assembled one's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from haq_lab.calibration.statistics import Policy
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.onepass import one_pass
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothquant import SmoothQuant
from tests.models.test_layered import whole_of

QUANTIZERS = {
    "rtn": RTN(),
    "rtn_static": RTN(activations="static"),
    "smoothquant": SmoothQuant(),
    "gptq4": GPTQ(weight_bits=4),
}


def pass_through(model, quantizer, windows, propagate="fp"):
    layers: dict[int, nn.Module] = {}
    calibration = windows.flip(0).flip(1)
    result = one_pass(
        model, quantizer, ReferenceBackend(), calibration, Policy(propagate), {"text": windows}, layers.__setitem__
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


@pytest.mark.parametrize("propagate", ["fp", "quantized"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_levels(tiny, windows, name, propagate):
    result, layers = pass_through(tiny, QUANTIZERS[name], windows, propagate)
    logits = {level: tiny.head(hidden) for level, hidden in result.hidden["text"].items()}
    expected = whole_of(tiny.folder)(windows).logits
    torch.testing.assert_close(logits["fp"], expected, rtol=1e-5, atol=1e-4)
    assert float((logits["smoothed"] - expected).norm() / expected.norm()) < 1e-4

    whole = tiny.assemble(layers)
    linears = [module for module in whole.get_submodule(tiny.family.layers).modules() if isinstance(module, Int8Linear)]
    assert len(linears) == len(result.reports) == tiny.depth * sum(len(group.consumers) for group in tiny.groups)
    # A level may tip at a tie where batches round differently; it stays far below what quantization changes.
    quantized = torch.cat([whole(window[None]).logits for window in windows])
    apart = float((logits["quantized"] - expected).norm())
    assert float((logits["quantized"] - quantized).norm()) < 0.02 * apart
    assert 0 < apart / float(expected.norm()) < (0.9 if name == "gptq4" else 0.35)


def test_propagating_the_quantised_model_gives_other_statistics(tiny, windows):
    scales = {}
    for propagate in ("fp", "quantized"):
        result, _ = pass_through(tiny, RTN(activations="static", weight_bits=4), windows, propagate)
        scales[propagate] = {(report.layer, report.linear): report.static_scale for report in result.reports}
    first = (0, tiny.groups[0].consumers[0])
    assert scales["fp"][first] == pytest.approx(scales["quantized"][first])
    assert scales["fp"] != scales["quantized"]


def test_nothing_to_evaluate_still_quantises(tiny, windows):
    layers: list[nn.Module] = []
    result = one_pass(tiny, RTN(), ReferenceBackend(), None, Policy(), {}, lambda index, layer: layers.append(layer))
    assert result.hidden == {}
    assert len(layers) == tiny.depth
    assert result.stopwatch.seconds["solve"] > 0
