"""The cuda backend gives the reference backend's bits: its kernels run on the host layer here."""

from __future__ import annotations

import pytest
import torch

from haq_lab.errors import UserError
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cuda import Kernels
from haq_lab.int8.cuda_backend import CudaBackend

from .checks import FLOATS, Draw
from .reference import assert_same_bits


@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k"), [(3, 64), (21, 200)])
def test_a_linear_has_the_references_bits(host: Kernels, m, k, dtype, scheme):
    draw = Draw(7)
    x, qw, sw = draw.activations(m, k, dtype), draw.int8(37, k), draw.scale(37)
    for bias in (None, draw.normal(37, dtype=dtype)):
        static = draw.scale(1)[0] if scheme == "static" else None
        results = [
            backend.linear(x, backend.pack(qw), sw, bias, scheme, static)
            for backend in (CudaBackend(host), ReferenceBackend())
        ]
        assert_same_bits(*results)


def test_sums_are_the_references(host: Kernels):
    draw = Draw(8)
    qx, qw = draw.int8(5, 40), draw.int8(9, 40)
    assert_same_bits(CudaBackend(host).accumulate(qx, qw), ReferenceBackend().accumulate(qx, qw))


def test_packed_weights_give_their_levels_back(host: Kernels):
    backend, levels = CudaBackend(host), Draw(9).int8(5, 40)
    packed = backend.pack(levels)
    assert packed.shape == (5, 48)
    assert_same_bits(backend.unpack(packed, 5, 40), levels)


def test_without_a_gpu_the_choice_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="backend=cuda needs an NVIDIA GPU"):
        CudaBackend()
