"""The cuda backend gives the reference backend's bits: its kernels run on the host layer here."""

from __future__ import annotations

import pytest

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
        arguments = (x, qw, sw, bias, scheme, static)
        assert_same_bits(CudaBackend(host).linear(*arguments), ReferenceBackend().linear(*arguments))


def test_sums_are_the_references(host: Kernels):
    draw = Draw(8)
    qx, qw = draw.int8(5, 40), draw.int8(9, 40)
    assert_same_bits(CudaBackend(host).accumulate(qx, qw), ReferenceBackend().accumulate(qx, qw))
