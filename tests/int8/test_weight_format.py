"""4-bit weights are packed two to a byte without loss, and every backend computes the same bits with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haq_lab.int8.backend import FakeBackend, PackedExpert, PackedLinear, ReferenceBackend
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear, MergedLinear, can_merge, parameter_count, to_float, weight_bytes
from haq_lab.int8.weight_format import INT8, WeightFormat, pack_nibbles, unpack_nibbles

ISAS = library.isas() if library.available() else ()
formats = st.sampled_from([WeightFormat(4), *(WeightFormat(4, group) for group in (128, 64, 32))])
# Around pairs of 4, groups of 32, chunks of 64 and panels of 32 rows; a depth of several steps is tested below.
widths = st.sampled_from([1, 3, 4, 7, 8, 9, 31, 32, 33, 63, 65, 100, 130, 257])
examples = settings(max_examples=40, deadline=None, derandomize=True)


def levels_of(*shape, generator=None):
    return torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator)


def packed_linear(backend, levels, format, generator, bias=True):
    """Return the linear on a backend, with the same scales and bias for the same seed."""
    n, k = levels.shape
    scale = 0.1 * torch.rand(format.scale_shape(n, k), generator=generator) + 1e-3
    return PackedLinear(
        backend.pack(levels, format), scale, torch.randn(n, generator=generator) if bias else None, format
    )


@examples
@given(n=st.integers(1, 9), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_packing_loses_nothing_and_halves_the_bytes(n, k, seed):
    levels = levels_of(n, k, generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(levels)
    assert packed.dtype == torch.uint8
    assert packed.shape == (n, (k + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, k), levels)


def test_every_pair_of_levels_has_its_own_byte():
    pairs = torch.cartesian_prod(torch.arange(-7, 8), torch.arange(-7, 8)).to(torch.int8)
    packed = pack_nibbles(pairs)
    assert len(packed.unique()) == 15 * 15
    assert torch.equal(unpack_nibbles(packed, 2), pairs)
    assert pack_nibbles(torch.tensor([[-7, 7]], dtype=torch.int8)).item() == 1 | 15 << 4, "the even column is lower"


def test_only_4_bit_weights_have_groups():
    for wrong in ({"bits": 8, "group": 64}, {"bits": 4, "group": 48}):
        with pytest.raises(ValueError, match="not supported"):
            WeightFormat(**wrong)


@examples
@given(format=formats, n=st.integers(1, 5), k=widths)
def test_a_scale_belongs_to_its_group(format, n, k):
    scale = torch.arange(1.0, 1 + torch.Size(format.scale_shape(n, k)).numel()).view(format.scale_shape(n, k))
    spread = format.row_scales(scale, k).expand(n, k)
    for row in range(n):
        for column in range(k):
            place = row if format.group is None else (column // format.group, row)
            assert spread[row, column] == scale[place]


@examples
@given(format=formats, m=st.integers(0, 4), n=st.integers(1, 5), k=widths, seed=st.integers(0, 99))
def test_the_reference_adds_groups_in_order(format, m, n, k, seed):
    """Scalar code for one output at a time, each float32 operation rounded on its own."""
    generator, backend = torch.Generator().manual_seed(seed), ReferenceBackend()
    levels, qx = levels_of(n, k, generator=generator), torch.randint(-127, 128, (m, k), dtype=torch.int8)
    weights = packed_linear(backend, levels, format, generator)
    row_scale = torch.rand(m, 1, generator=generator)
    got = backend.product(qx, row_scale, weights, torch.float32)
    group, scales = format.group or k, weights.scale.view(-1, n)
    for row in range(m):
        for column in range(n):
            total = torch.zeros(())
            for number, first in enumerate(range(0, k, group)):
                part = slice(first, first + group)
                total = total + (qx[row, part].long() @ levels[column, part].long()).float() * scales[number, column]
            assert got[row, column] == total * row_scale[row, 0] + weights.bias[column]


@pytest.mark.parametrize("isa", ISAS)
@examples
@given(
    format=formats,
    m=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 13, 14, 15, 17, 32, 33]),
    n=st.sampled_from([1, 31, 32, 33, 65, 100]),
    k=widths,
    kind=st.sampled_from([torch.float32, torch.bfloat16]),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_kernels_equal_the_reference(isa, format, m, n, k, kind, static, seed):
    backend, reference = CpuBackend(), ReferenceBackend()
    levels = levels_of(n, k, generator=torch.Generator().manual_seed(seed))
    ours, theirs = (
        packed_linear(one, levels, format, torch.Generator().manual_seed(seed), bias=seed % 2 == 0)
        for one in (backend, reference)
    )
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(kind)
    how = ("static", torch.tensor(0.02)) if static else ("token", None)
    with library.forced_isa(isa):
        assert torch.equal(backend.unpack(ours.packed, n, k, format), levels)
        wanted = reference.linear(x, theirs, *how)
        assert torch.equal(backend.linear(x, ours, *how), wanted)
        quantized = reference.quantize(x, *how)
        assert torch.equal(backend.product(*quantized, ours, kind), wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("group", [None, 128, 64, 32])
def test_many_rows_and_columns_in_several_steps(isa, threads, group):
    """Depths beyond one step of 640 columns, and extreme values: sums of +-127 * 7 and of opposite signs."""
    format, generator = WeightFormat(4, group), torch.Generator().manual_seed(0)
    backend, reference, before = CpuBackend(), ReferenceBackend(), torch.get_num_threads()
    levels = levels_of(100, 2100, generator=generator)
    levels[0], levels[1] = 7, -7
    x = torch.randn(70, 2100, generator=generator)
    x[0], x[1] = 3.0, -3.0
    ours, theirs = (
        packed_linear(one, levels, format, torch.Generator().manual_seed(1)) for one in (backend, reference)
    )
    torch.set_num_threads(threads)
    try:
        with library.forced_isa(isa):
            assert torch.equal(backend.linear(x, ours, "token", None), reference.linear(x, theirs, "token", None))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@examples
@given(
    parts=st.tuples(*[st.sampled_from([INT8, WeightFormat(4), WeightFormat(4, 32)])] * 3),
    m=st.integers(0, 20),
    k=st.sampled_from([5, 32, 70]),
    f=st.sampled_from([3, 40, 100]),
    seed=st.integers(0, 99),
)
def test_an_expert_may_mix_formats(isa, parts, m, k, f, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    shapes = ((f, k), (f, k), (k, f))
    levels = [levels_of(*shape, generator=generator) for shape in shapes]

    def expert(backend):
        own = torch.Generator().manual_seed(seed)
        linears = [
            packed_linear(backend, part, form, own, bias=False) for part, form in zip(levels, parts, strict=True)
        ]
        return backend.expert(*backend.quantize(x, "token", None), PackedExpert(*linears, "token"))

    with library.forced_isa(isa):
        assert torch.equal(expert(CpuBackend()), expert(ReferenceBackend()))


def int4_linear(backend, n=6, k=70, group=32, bias=True):
    format, generator = WeightFormat(4, group), torch.Generator().manual_seed(0)
    scale = torch.rand(format.scale_shape(n, k), generator=generator) + 0.1
    given = torch.randn(n, generator=generator) if bias else None
    return Int8Linear(levels_of(n, k, generator=generator), scale, given, "token", None, backend, format=format)


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
def test_a_linear_holds_half_the_bytes(backend):
    linear = int4_linear(backend(), 64, 64, 32, bias=False)
    assert weight_bytes(linear) == 64 * 64 // 2 + 2 * 64 * 4
    assert parameter_count(linear) == 64 * 64
    assert linear.weight.dtype == torch.int8
    assert "weight_bits=4, group=32" in repr(linear)


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
@pytest.mark.parametrize("other", [ReferenceBackend, CpuBackend])
def test_a_state_dict_has_packed_weights(backend, other):
    linear, copy = int4_linear(backend()), int4_linear(other())
    state = linear.state_dict()
    assert state["weight_packed"].shape == (6, 35)
    assert state["weight_scale"].shape == (3, 6)
    copy.packed.zero_()
    copy.load_state_dict(state)
    x = torch.randn(3, 70)
    assert torch.equal(copy(x), linear(x))
    assert torch.equal(linear.on(other())(x), linear(x))
    with pytest.raises(ValueError, match=r"weight_packed: \(7, 35\)"):
        copy.load_state_dict(int4_linear(backend(), 7).state_dict())


def test_the_fake_backend_multiplies_dequantised_weights():
    linear = int4_linear(FakeBackend())
    x = torch.randn(40, 70)
    expected = torch.nn.functional.linear(x, to_float(linear), linear.bias)
    assert (linear(x) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
def test_merged_linears_give_the_same_bits(backend):
    one = backend()
    members = [int4_linear(one, n) for n in (32, 64)]
    x = torch.randn(3, 70)
    wanted = [member(x) for member in members]
    assert can_merge(members)
    assert not can_merge([members[0], int4_linear(one, 32, group=64)]), "their scales have other shapes"
    merged = MergedLinear(members)
    assert merged.weight_scale.shape == (3, 96)
    for member, y in zip(members, wanted, strict=True):
        assert torch.equal(member(x), y)
        assert weight_bytes(member) == weight_bytes(torch.nn.ModuleList(members)), (
            "members are views of the merged tensors"
        )
    assert torch.equal(members[1].on(ReferenceBackend())(x), wanted[1])


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
def test_dequantizing_multiplies_each_level_by_its_scale(backend):
    linear = int4_linear(backend())
    got = linear.backend.dequantize(linear.packed, linear.weight_scale, 70, torch.float16, linear.format)
    assert torch.equal(got, to_float(linear).half())
