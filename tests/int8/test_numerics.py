"""The definition of the W8A8 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from haq_lab.int8.numerics import epilogue, quantize_activations, round_to_grid, scale_of, swiglu
from tests.kernels import reference

LARGE = 2.0**127
floats = st.floats(-LARGE, LARGE, width=32)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=floats)


def test_rounds_half_to_even_and_clamps_symmetrically():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 300.0, -300.0])
    assert round_to_grid(x, 1.0).tolist() == [0, 2, 2, 0, -2, -2, 126, 127, 127, -127]


@given(hnp.arrays(np.float32, st.integers(1, 9), elements=st.floats(0, LARGE, width=32)))
def test_scale_maps_the_maximum_to_127_and_is_never_zero(maximum):
    scale = scale_of(torch.from_numpy(maximum))
    assert scale.dtype == torch.float32
    assert (scale > 0).all()
    assert (scale[torch.from_numpy(maximum) == 0] == 1).all()
    normal = torch.from_numpy(maximum > 1e-30)
    torch.testing.assert_close(scale[normal] * 127, torch.from_numpy(maximum)[normal])


@given(matrices)
def test_token_scheme_has_one_scale_per_row(values):
    x = torch.from_numpy(values)
    levels, scale = quantize_activations(x, "token", None)
    assert levels.dtype == torch.int8
    assert scale.shape == (len(x), 1)
    assert int(levels.int().abs().max()) <= 127
    error = (levels.double() * scale.double() - x.double()).abs()
    normal = scale > 1e-35  # a subnormal scale has few bits of its own
    assert (error <= scale.double() * 0.5001)[normal.expand_as(x)].all()
    for row, (alone, alone_scale) in enumerate(quantize_activations(part, "token", None) for part in x.split(1)):
        assert torch.equal(levels[row : row + 1], alone)
        assert torch.equal(scale[row : row + 1], alone_scale)


@given(matrices)
def test_tensor_scheme_has_one_scale_for_all(values):
    x = torch.from_numpy(values)
    levels, scale = quantize_activations(x, "tensor", None)
    assert scale.shape == (len(x), 1)
    assert (scale == scale_of(x.abs().amax())).all()
    assert torch.equal(levels, round_to_grid(x, scale).to(torch.int8))


@given(matrices, st.floats(2.0**-10, 2.0**10, width=32))
def test_static_scheme_takes_the_scale_it_is_given_and_clips(values, static):
    x = torch.from_numpy(values)
    levels, scale = quantize_activations(x, "static", torch.tensor(static))
    assert scale.shape == (len(x), 1)
    assert (scale == torch.tensor(static)).all()
    assert (levels[x > 127 * static] == 127).all()
    assert (levels[x < -127 * static] == -127).all()


def test_static_scheme_without_a_scale():
    with pytest.raises(AssertionError, match="calibration"):
        quantize_activations(torch.ones(1, 2), "static", None)


@pytest.mark.parametrize("scheme", ["token", "tensor"])
def test_zeros_and_no_rows(scheme):
    levels, scale = quantize_activations(torch.zeros(2, 3), scheme, None)
    assert (levels == 0).all()
    assert (scale == 1).all()
    levels, scale = quantize_activations(torch.zeros(0, 3), scheme, None)
    assert levels.shape == (0, 3)
    assert scale.shape == (0, 1)


def test_the_input_is_not_changed():
    x = torch.randn(4, 8)
    before = x.clone()
    for scheme in ("token", "tensor", "static"):
        quantize_activations(x, scheme, torch.tensor(0.1))
    assert torch.equal(x, before), "q, k and v share this tensor"


def test_epilogue_order_is_row_scale_then_column_scale_then_bias():
    accumulators = torch.tensor([[16777217, -3]], dtype=torch.int32)
    row, column, bias = torch.tensor([[0.1]]), torch.tensor([0.3, 7.0]), torch.tensor([1.0, 2.0])
    expected = np.float32(accumulators.numpy()) * np.float32(0.1) * np.float32([0.3, 7.0]) + np.float32([1.0, 2.0])
    assert epilogue(accumulators, row, column, bias).numpy().tolist() == expected.tolist()
    assert epilogue(accumulators, row, column, None).dtype == torch.float32


@given(hnp.arrays(np.float32, (2, 7), elements=st.floats(-200, 200, width=32)))
def test_swiglu_is_bit_identical_to_the_kernels_and_close_to_silu(values):
    gate, up = torch.from_numpy(values)
    got = swiglu(gate, up)
    assert torch.equal(got, torch.from_numpy(reference.swiglu(*values)))
    wanted = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-30)
