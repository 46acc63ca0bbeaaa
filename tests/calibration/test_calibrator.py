"""Calibration tokens see the full-precision model, or the model as quantised so far."""

from __future__ import annotations

import torch

from haq_lab.calibration.calibrator import Calibrator
from haq_lab.calibration.observe import record_inputs
from haq_lab.calibration.spool import Spool
from haq_lab.calibration.statistics import Needs, Policy
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.quantizers.apply import quantize_group
from haq_lab.quantizers.rtn import RTN
from haq_lab.stopwatch import Stopwatch

NEEDS = Needs(inputs=True, hessian=True, cross=True, sample=True)


def calibrate(model, windows, propagate, needs=NEEDS):
    """Statistics by layer and site, with 4-bit RTN on the way; and the quantised layers."""
    calibrator = Calibrator(model, needs, windows, Policy(propagate), Stopwatch(), Spool())
    seen, layers = {}, []
    for index in range(model.depth):
        layer = model.load_layer(index)
        calibrator.enter(layer, index)
        for group in model.groups:
            seen[index, group.site] = calibrator.statistics(layer, index, group)
            quantize_group(layer, index, group, RTN(weight_bits=4), None, None, ReferenceBackend())
        calibrator.leave(layer, index)
        layers.append(layer)
    return seen, layers


def hessian(x):
    return x.t() @ x / len(x)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def inputs_of(model, layers, windows):
    """What the linears of these layers receive, by layer and site."""
    hidden, inputs = model.embed(windows), {}
    sites = [group.site for group in model.groups]
    for index, layer in enumerate(layers):
        for site, x in record_inputs(model, layer, index, hidden, sites).items():
            inputs[index, site] = x
    return inputs


def test_full_precision(tiny, windows):
    seen, _ = calibrate(tiny, windows, "fp")
    expected = inputs_of(tiny, [tiny.load_layer(index) for index in range(tiny.depth)], windows)
    assert set(seen) == set(expected)
    for key, x in expected.items():
        close(seen[key].hessian, hessian(x))
        assert (seen[key].cross == 0).all()


def test_quantized(tiny, windows):
    seen, layers = calibrate(tiny, windows, "quantized")
    quantized = inputs_of(tiny, layers, windows)
    full = inputs_of(tiny, [tiny.load_layer(index) for index in range(tiny.depth)], windows)
    # All groups of a layer are RTN here, so a group's input is the finished layer's: earlier groups were done.
    for key, x in quantized.items():
        close(seen[key].hessian, hessian(x))
        close(seen[key].cross, (full[key] - x).t() @ x / len(x) + 0)
    differs = [(seen[key].hessian - hessian(full[key])).norm() / hessian(full[key]).norm() for key in full]
    assert differs[0] < 1e-5, "the first layer's first input is no one's product"
    assert max(differs) > 0.01


def test_nothing_is_run_where_nothing_is_needed(tiny, windows):
    for needs, tokens in ((Needs(), windows), (NEEDS, None)):
        seen, _ = calibrate(tiny, tokens, "quantized", needs)
        assert set(seen.values()) == {None}
