"""Packed weights lie one after the other in one block, and merged linears are views of it."""

import pytest
import torch

from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.cpu.weight_block import WeightBlock
from haq_lab.int8.linear import Int8Linear, MergedLinear

pytestmark = pytest.mark.skipif(not library.available(), reason="no CPU kernels here")


def levels(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8)


def test_weights_are_adjacent_and_exact():
    weights = [levels(64, 50), levels(40, 50), levels(33, 7)]  # the last panels are not full
    with WeightBlock(sum(native.packed_bytes(*weight.shape) for weight in weights)):
        packed = [native.pack(weight) for weight in weights]
    outside = [native.pack(weight) for weight in weights]
    for inside, alone, weight in zip(packed, outside, weights, strict=True):
        assert torch.equal(inside.data, alone.data)
        assert torch.equal(native.unpack(inside), weight)
    addresses = [part.data.data_ptr() for part in packed]
    assert addresses[1:] == [start + part.data.nbytes for start, part in zip(addresses[:-1], packed[:-1], strict=True)]


def test_a_full_block_is_left():
    weight = levels(32, 16)
    block = WeightBlock(native.packed_bytes(32, 16))
    with block:
        first = native.pack(weight).data
    with block:
        second = native.pack(weight).data
    assert torch.equal(first, second)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_a_block_ends_with_its_statement():
    block = WeightBlock(1 << 20)
    with pytest.raises(KeyError), block:
        raise KeyError
    data = native.pack(levels(32, 16)).data
    assert data.untyped_storage().nbytes() == data.nbytes


def test_merged_linears_are_views_of_the_block():
    backend, shapes = CpuBackend(), [(64, 50), (32, 50)]
    if not backend.native:
        pytest.skip("the kernels are not exact here")
    weights, scale = [levels(*shape) for shape in shapes], torch.rand(96) + 0.1
    with backend.weight_block(shapes):
        members = [
            Int8Linear(weight, part, None, "token", None, backend)
            for weight, part in zip(weights, scale.split([64, 32]), strict=True)
        ]
    addresses = [member.packed.data_ptr() for member in members]
    x = torch.randn(3, 50)
    wanted = [member(x) for member in members]
    merged = MergedLinear(members)
    assert merged.packed.data_ptr() == addresses[0]
    assert merged.weight_scale.data_ptr() == scale.data_ptr()
    assert [member.packed.data_ptr() for member in members] == addresses
    assert all(torch.equal(member(x), y) for member, y in zip(members, wanted, strict=True))
