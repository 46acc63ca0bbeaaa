"""Merged linears are bit-identical to separate ones."""

from __future__ import annotations

import copy

import pytest
import torch

from haq_lab.int8.backend import FakeBackend, ReferenceBackend
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear, MergedLinear, can_merge, parameter_count, weight_bytes
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.deploy import merge_linears, move_to_huge_pages

BACKENDS = [ReferenceBackend(), CpuBackend(), FakeBackend()]


def linears(backend, rows=(64, 32, 40), scheme="token", bias=False):
    """Three linears with the same input. The rows of the last do not fill a panel."""
    scale = torch.tensor(0.02) if scheme == "static" else None
    return [
        Int8Linear(
            torch.randint(-127, 128, (n, 50), dtype=torch.int8),
            torch.rand(n) + 0.01,
            torch.randn(n) if bias else None,
            scheme,
            scale,
            backend,
        )
        for n in rows
    ]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
def test_outputs_are_bit_identical(backend, bias, scheme):
    members = linears(backend, scheme=scheme, bias=bias)
    levels, size = [member.weight.clone() for member in members], weight_bytes(torch.nn.ModuleList(members))
    assert can_merge(members)
    for x in (torch.randn(1, 1, 50), torch.randn(2, 7, 50), torch.randn(3, 50)):
        apart = [member(x) for member in members]
        together = copy.deepcopy(members)
        merged = MergedLinear(together)
        for _ in range(2):
            for got, wanted in zip([member(x) for member in together], apart, strict=True):
                # fake multiplies in float, whose sums may depend on the width
                assert torch.equal(got, wanted) or (not backend.exact and torch.allclose(got, wanted, atol=1e-4))
        assert merged._input is None
    module = torch.nn.ModuleList(together)
    assert weight_bytes(module) == size, "nothing is held twice"
    assert parameter_count(module) == sum(member.weight.numel() for member in members) + bias * 136
    for member, before in zip(together, levels, strict=True):
        assert torch.equal(member.weight, before)


@pytest.mark.parametrize("backend", BACKENDS[:2], ids=lambda backend: backend.name)
def test_an_input_changed_in_place_is_computed_again(backend):
    members = linears(backend)
    apart = copy.deepcopy(members)
    MergedLinear(members)
    x = torch.randn(2, 50)
    assert torch.equal(members[0](x), apart[0](x))
    x.mul_(3)
    assert torch.equal(members[1](x), apart[1](x))
    assert torch.equal(members[1](x), apart[1](x)), "and calls may come in any order, any number of times"
    assert torch.equal(members[0](x + 1), apart[0](x + 1))


@pytest.mark.parametrize("backend", BACKENDS[:2], ids=lambda backend: backend.name)
def test_members_can_be_scaled_and_loaded(backend):
    members, other = linears(backend), linears(backend)
    MergedLinear(members)
    for member, source in zip(members, other, strict=True):
        member.load_state_dict(source.state_dict())
        member.weight_scale.div_(2)
    x = torch.randn(3, 50)
    for member, source in zip(members, other, strict=True):
        assert torch.equal(member(x), source(x) / 2)


def test_linears_that_differ_cannot_be_merged():
    backend = ReferenceBackend()
    a, b, _ = linears(backend)
    assert not can_merge([a])
    assert not can_merge([a, linears(ReferenceBackend())[1]])
    assert not can_merge([a, linears(backend, scheme="tensor")[1]])
    assert not can_merge([a, linears(backend, bias=True)[1]])
    static, other = linears(backend, scheme="static"), linears(backend, scheme="static")
    assert can_merge([static[0], other[1]])
    other[1].input_scale.mul_(2)
    assert not can_merge([static[0], other[1]])
    MergedLinear([a, b])
    assert not can_merge([a, b])


@pytest.mark.skipif(not library.available(), reason="no CPU kernels here")
def test_rows_that_do_not_fill_a_panel_can_only_be_last():
    members = linears(CpuBackend(), rows=(40, 64))
    assert not can_merge(members)
    assert can_merge(members[::-1])


def test_a_layer_of_every_family_is_bit_identical(tiny, windows):
    """Whole windows run through the layer's own code, as for perplexity."""
    layers: list[torch.nn.Module] = []
    sequential_pass(PassInputs(tiny, RTN(), CpuBackend(), None, "fp", {}), lambda index, layer: layers.append(layer))
    hidden = tiny.embed(windows)
    wanted = tiny.run(layers[0], 0, hidden.clone())
    size = weight_bytes(layers[0])
    merge_linears(layers[0], tiny.groups_of(0))
    move_to_huge_pages(layers[:1])
    merged = {m.merged for m in layers[0].modules() if isinstance(m, Int8Linear) and m.merged is not None}
    moe = tiny.family.moe is not None  # each expert reads tokens of its own, so only q/k/v are merged
    assert len(merged) == (1 if moe else {"llama": 2, "opt": 1}[tiny.config.model_type])
    assert torch.equal(tiny.run(layers[0], 0, hidden.clone()), wanted)
    assert weight_bytes(layers[0]) == size
