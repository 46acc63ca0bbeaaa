"""Test that statistics come from the full-precision model, or from the model as quantised so far."""

from __future__ import annotations

import pytest
import torch

from haq_lab.calibration import calibrator as module
from haq_lab.calibration.calibrator import Calibrator
from haq_lab.calibration.hooks import captured_inputs
from haq_lab.calibration.statistics import CalibrationPolicy, Needs
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.quantizers.apply import quantize_group
from haq_lab.quantizers.rtn import RTN
from haq_lab.result_cache.store import Store
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.timer import Stopwatch

NEEDS = Needs(inputs=True, hessian=True, cross=True, sample=True)


def calibrate(model, windows, inputs, needs=NEEDS, route="topk"):
    """Return statistics by layer and site while quantising with 4-bit RTN, the quantised layers, and the calibrator."""
    policy = CalibrationPolicy(inputs, route, min_tokens=1)
    calibrator = Calibrator(model, needs, windows, policy, Stopwatch(), HiddenStateBuffer(), Store(), {})
    seen, layers = {}, []
    for index in range(model.depth):
        layer = model.load_layer(index)
        calibrator.enter(layer, index)
        for group in model.groups_of(0):
            seen[index, group.site] = calibrator.statistics(layer, index, group)
            quantize_group(layer, index, group, RTN(weight_bits=4), None, None, ReferenceBackend())
        calibrator.leave(layer, index)
        layers.append(layer)
    return seen, layers, calibrator


def hessian(x):
    return x.t() @ x / len(x)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def inputs_of(model, layers, windows):
    """Return the inputs of the linears of these layers by layer and site, from one batch of all windows."""
    hidden, inputs = model.embed(windows), {}
    sites = [group.site for group in model.groups_of(0)]
    for index, layer in enumerate(layers):
        with captured_inputs(layer, sites) as seen:
            output = model.forward(layer, index, hidden)
        inputs |= {(index, site): x.reshape(-1, x.shape[-1]) for site, (x,) in seen.items()}
        hidden = output
    return inputs


def test_full_precision(tiny, windows):
    seen, _, _ = calibrate(tiny, windows, "fp")
    expected = inputs_of(tiny, [tiny.load_layer(index) for index in range(tiny.depth)], windows)
    routed = {group.site for group in tiny.groups_of(0) if group.expert is not None}
    assert set(expected) <= set(seen)
    for key, x in expected.items():
        close(seen[key].hessian, hessian(x))
        assert key[1] in routed or (seen[key].cross == 0).all()
        assert not seen[key].stands_in
    assert all(seen[key].stands_in for key in set(seen) - set(expected)), "experts that no token was sent to"


def test_quantized(tiny, windows):
    seen, layers, _ = calibrate(tiny, windows, "quantized")
    quantized = inputs_of(tiny, layers, windows)
    full = inputs_of(tiny, [tiny.load_layer(index) for index in range(tiny.depth)], windows)
    # All groups of a layer are RTN here, so a group's input is the finished layer's: earlier groups were done.
    shared_sites = {group.site for group in tiny.groups_of(0) if group.expert is None}
    differs = []
    for key, x in quantized.items():
        close(seen[key].hessian, hessian(x))
        if key[1] in shared_sites:
            close(seen[key].cross, (full[key] - x).t() @ x / len(x) + 0)
            differs.append((seen[key].hessian - hessian(full[key])).norm() / hessian(full[key]).norm())
        else:
            assert seen[key].cross is None, "a token may be routed elsewhere at full precision"
    assert differs[0] < 1e-5, "the first layer's first input comes from no quantised layer"
    assert max(differs) > 0.01


def test_nothing_is_run_if_nothing_is_needed(tiny, windows):
    for needs, tokens in ((Needs(), windows), (NEEDS, None)):
        seen, _, calibrator = calibrate(tiny, tokens, "quantized", needs)
        assert set(seen.values()) == {None}
        assert calibrator.routing is None


@pytest.mark.parametrize("architecture", ["mixtral"])
@pytest.mark.parametrize("inputs", ["fp", "quantized"])
def test_experts_are_observed_in_as_many_forwards_as_memory_requires(tiny, windows, inputs, monkeypatch):
    forwards = []
    original = module.observe
    monkeypatch.setattr(module, "observe", lambda *arguments: (forwards.append(1), original(*arguments)))
    at_once, _, _ = calibrate(tiny, windows, inputs)
    few, forwards[:] = len(forwards), []
    assert few <= 4 * tiny.depth, "one for each distinct input, and one for all down projections"
    monkeypatch.setattr(module, "HESSIAN_BYTES", 3 * 4 * 96**2)  # three experts' down projections
    in_turn, _, _ = calibrate(tiny, windows, inputs)
    assert len(forwards) == few + 2 * tiny.depth
    for key, statistics in at_once.items():
        close(in_turn[key].hessian, statistics.hessian)
