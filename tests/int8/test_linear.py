"""Int8Linear stores int8 weights, and memory is counted from storages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear, parameter_count, to_float, weight_bytes
from haq_lab.int8.sequences import batch_of


def int8_linear(outputs=6, inputs=10, bias=True, scheme="token", backend=None):
    return Int8Linear(
        torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8),
        torch.rand(outputs) + 0.1,
        torch.randn(outputs) if bias else None,
        scheme,
        torch.tensor(0.05) if scheme == "static" else None,
        backend or ReferenceBackend(),
    )


@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
def test_leading_dimensions_are_kept(scheme):
    linear = int8_linear(scheme=scheme)
    x = torch.randn(2, 3, 10)
    y = linear(x)
    assert y.shape == (2, 3, 6)
    with batch_of(2, 3):
        torch.testing.assert_close(y.flatten(0, 1), linear(x.flatten(0, 1)))
    assert linear(x[:, :0]).shape == (2, 0, 6)


def test_is_close_to_the_float_linear():
    linear = int8_linear()
    x = torch.randn(50, 10)
    expected = nn.functional.linear(x, to_float(linear), linear.bias)
    assert (linear(x) - expected).norm() / expected.norm() < 0.02


def test_weights_are_int8_and_counted_as_such():
    linear = int8_linear()
    assert linear.weight.dtype == torch.int8
    assert weight_bytes(linear) == 6 * 10 + 6 * 4 + 6 * 4
    assert parameter_count(linear) == 6 * 10 + 6
    packing = int8_linear(64, 12, bias=False, backend=CpuBackend())
    assert packing.weight.dtype == torch.int8
    assert weight_bytes(packing) == 64 * 12 + 64 * 4, "packed weights are held in place of the levels"
    assert parameter_count(packing) == 64 * 12
    assert "in=10, out=6, activations=token, backend=reference" in repr(linear)


def test_ties_and_views_count_once():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
    assert weight_bytes(model) == 2 * 7 * 5 * 4
    assert parameter_count(model) == 2 * 7 * 5
    model["head"].weight = model["embed"].weight
    assert weight_bytes(model) == 7 * 5 * 4
    assert parameter_count(model) == 7 * 5


@pytest.mark.parametrize("others", [ReferenceBackend, CpuBackend])
def test_a_state_dict_can_be_loaded_on_another_backend(others):
    linear, other = int8_linear(scheme="static"), int8_linear(scheme="static", backend=others())
    other.load_state_dict(linear.state_dict())
    x = torch.randn(3, 10)
    assert torch.equal(other(x), linear(x))
    assert set(linear.state_dict()) == set(other.state_dict()) == {"weight", "weight_scale", "bias", "input_scale"}
    assert torch.equal(other.state_dict()["weight"], linear.weight)


def test_levels_of_another_shape_are_not_loaded():
    with pytest.raises(ValueError, match=r"weight: \(7, 10\) torch.int8 is not \(6, 10\)"):
        int8_linear(6).load_state_dict(int8_linear(7).state_dict())


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
def test_a_factor_divides_the_row_scales(backend):
    """Folding a smoothing factor into an int8 source (haq_lab/quantizers/smoothing.py) does not change the levels."""
    linear = int8_linear(bias=False, backend=backend())
    x, factor = torch.randn(4, 10), torch.rand(6) + 0.5
    before = linear(x)
    linear.weight_scale.div_(factor)
    torch.testing.assert_close(linear(x), before / factor)
