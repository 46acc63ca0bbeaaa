"""Experts in one launch a projection give what the loop over them gives, and ask the device for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import relu

from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import Launch
from haq_lab.int8.linear import Int8Linear, weight_bytes
from haq_lab.int8.weight_format import INT8, WeightFormat
from haq_lab.models.experts import Expert, Experts, dispatch, gated_by
from haq_lab.models.int8_experts import Int8Experts, projections
from haq_lab.offload.tiers.disk import ExpertFileWriter
from haq_lab.runtime.grouped_experts import GroupedExperts, can_group

WIDTH, INNER, COUNT = 24, 48, 5  # a width that is padded, an inner one that is not
SILU = torch.nn.SiLU()  # a module, as transformers' activations are


FORMATS = st.sampled_from([INT8, *(WeightFormat(4, group) for group in (None, 64, 32))])
one_version = pytest.mark.parametrize("host_runner", [80], indirect=True, ids=["sm_80"])


def experts(
    backend: CudaBackend, scheme="token", scales=(0.1,) * COUNT, act_fn=SILU, inner=INNER, formats=(INT8, INT8)
) -> Int8Experts:
    """`scales`: of the experts' down projections, where the scheme is static. `formats`: of gate/up and of down."""
    generator = torch.Generator().manual_seed(7)

    def linear(rows: int, columns: int, scale: float, format: WeightFormat = formats[0]) -> Int8Linear:
        largest = 127 if format.bits == 8 else 7
        levels = torch.randint(-largest, largest + 1, (rows, columns), dtype=torch.int8, generator=generator)
        weight_scale = 0.01 * torch.rand(format.scale_shape(rows, columns), generator=generator) + 1e-3
        static = torch.tensor(scale) if scheme == "static" else None
        return Int8Linear(levels, weight_scale.to(backend.device), None, scheme, static, backend, format=format)

    made = Experts()
    for scale in scales:
        gate_up = linear(inner, WIDTH, 0.02), linear(inner, WIDTH, 0.02)
        made.append(Expert((*gate_up, linear(WIDTH, inner, scale, formats[1])), gated_by(act_fn)))
    quantized = Int8Experts.of(made)
    quantized.swiglu = act_fn is SILU
    return quantized


def loop_with_the_kernels_activation(
    made: Int8Experts, kernels: Kernels, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The contract: the loop over experts, its activation computed by `swiglu_quantize`."""
    levels, scale = made.backend.quantize(hidden, made.scheme, made.input_scale)

    def run(number: int, tokens: Tensor) -> Tensor:
        gate, up, down = projections(made.expert(number))
        own = levels[tokens], scale[tokens]
        static = None if down.input_scale is None else down.input_scale.reshape(1)
        both = torch.cat([gate.product(*own), up.product(*own)], dim=1)
        return down.product(*kernels.swiglu_quantize(both, static)).to(hidden.dtype)

    return dispatch(hidden, chosen, weights, run)


@st.composite
def routings(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with two experts each, of those that are open: often some have no token at all."""
    open_experts = draw(st.lists(st.integers(0, COUNT - 1), min_size=2, max_size=COUNT, unique=True))
    tokens = draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    pairs = [draw(st.permutations(open_experts))[:2] for _ in range(tokens)]
    hidden = 3 * torch.randn(tokens, WIDTH, generator=generator)
    return hidden, torch.tensor(pairs, dtype=torch.long).view(tokens, 2), torch.rand(tokens, 2, generator=generator)


@one_version
@settings(max_examples=8)
@given(routing=routings(), scheme=st.sampled_from(["token", "static"]), half=st.booleans())
def test_the_bits_of_the_loop(host: Kernels, routing, scheme, half):
    hidden, chosen, weights = routing
    hidden = hidden.bfloat16() if half else hidden
    made = experts(CudaBackend("cpu", host), scheme)
    wanted = loop_with_the_kernels_activation(made, host, hidden, chosen, weights)
    assert torch.equal(made(hidden, chosen, weights), wanted)
    assert torch.equal(GroupedExperts.of(made)(hidden, chosen, weights), wanted)


@one_version
@settings(max_examples=8)
@given(routing=routings(), formats=st.tuples(FORMATS, FORMATS), inner=st.sampled_from([48, 96]))
def test_the_bits_of_the_loop_with_4_bit_weights(host: Kernels, routing, formats, inner):
    """Of one format in gate and up and of another in down, and with inner widths that are no multiple of a group."""
    made = experts(CudaBackend("cpu", host), inner=inner, formats=formats)
    wanted = loop_with_the_kernels_activation(made, host, *routing)
    assert torch.equal(made(*routing), wanted)
    grouped = GroupedExperts.of(made)
    assert torch.equal(grouped(*routing), wanted)
    assert torch.equal(made(*routing), wanted), "the linears are views now"


@one_version
@settings(max_examples=8)
@given(routing=routings(), own=st.booleans())
def test_the_loops_bits_where_no_kernel_computes_the_activation(host: Kernels, routing, own):
    """Another one than SiLU, or scales of each expert's own."""
    static = {"scheme": "static", "scales": [0.01 * 2**number for number in range(COUNT)]} if own else {"act_fn": relu}
    made = experts(CudaBackend("cpu", host), **static)
    wanted = made(*routing)
    assert torch.equal(GroupedExperts.of(made)(*routing), wanted)


@one_version
def test_torchs_activation_is_met_up_to_its_last_places(host: Kernels):
    hidden, chosen, weights = torch.randn(60, WIDTH), torch.randint(0, 4, (60, 1)) + torch.arange(2), torch.rand(60, 2)
    made = experts(CudaBackend("cpu", host))
    made.swiglu = False
    wanted = made(hidden, chosen, weights)
    made.swiglu = True
    error = (GroupedExperts.of(made)(hidden, chosen, weights) - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert error.median() < 1e-6
    assert error.max() < 0.02, "a value beside its level, here and there"


@one_version
@pytest.mark.parametrize("format", [INT8, WeightFormat(4, 32)], ids=["int8", "int4"])
def test_weights_are_held_once_and_the_linears_keep_theirs(host: Kernels, format: WeightFormat):
    made = experts(CudaBackend("cpu", host), formats=(format, format))
    size, before = weight_bytes(made), {name: tensor.clone() for name, tensor in made.state_dict().items()}
    grouped = GroupedExperts.of(made)
    assert weight_bytes(grouped) == size
    assert len(grouped) == COUNT, "an activation is no expert"
    assert list(grouped.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in grouped.state_dict().items())
    storages = {linear.packed.untyped_storage().data_ptr() for expert in grouped for linear in projections(expert)}
    assert len(storages) == 2


@one_version
def test_weights_that_are_loaded_or_scaled_later_are_used(host: Kernels):
    made, other = (experts(CudaBackend("cpu", host)) for _ in range(2))
    for expert in other:
        expert.up_proj.packed.neg_()
        expert.down_proj.weight_scale.mul_(2)
    routing = torch.randn(9, WIDTH), torch.randint(0, 4, (9, 1)) + torch.arange(2), torch.rand(9, 2)
    wanted = loop_with_the_kernels_activation(other, host, *routing)
    grouped = GroupedExperts.of(made)
    assert not torch.equal(grouped(*routing), wanted)
    grouped.load_state_dict(other.state_dict())
    assert torch.equal(grouped(*routing), wanted)


class Recorder:
    """Executes nothing: on `meta` there are shapes and no values, so that whoever asks for one fails."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_is_asked_of_the_device(fused: bool):
    recorder = Recorder()
    backend = CudaBackend("meta", Kernels(recorder, architecture=80, multiprocessors=4, shared_limit=64 * 1024))
    made = experts(backend, act_fn=SILU if fused else relu)
    routing = torch.empty(30, WIDTH, device="meta"), torch.zeros(30, 2, dtype=torch.long, device="meta")
    weights = torch.empty(30, 2, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        made(*routing, weights)
    grouped = GroupedExperts.of(made)
    recorder.launches.clear()
    assert grouped(*routing, weights).shape == (30, WIDTH)
    names = [launch.kernel for launch in recorder.launches]
    activation = "swiglu_quantize_f32" if fused else "quantize_f32"
    assert names == ["quantize_f32", "grouped_16x64_f32", activation, "grouped_16x64_f32"]


@one_version
def test_what_is_not_grouped(host: Kernels, tmp_path: Path):
    backend = CudaBackend("cpu", host)
    assert can_group(experts(backend))
    assert not can_group(experts(backend, "tensor"))
    assert not can_group(experts(backend, inner=40))
    assert can_group(experts(backend, formats=(WeightFormat(4, 32), INT8)))
    several = experts(backend)
    several[1].down_proj.format = WeightFormat(4)  # type: ignore
    assert not can_group(several), "a format of each projection is one launch"
    mixed = experts(backend)
    mixed[1].down_proj.scheme, mixed[1].down_proj.input_scale = "static", torch.tensor(0.1)  # type: ignore
    assert not can_group(mixed)
    offloaded = experts(backend)
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        writer.add(offloaded)
    assert not can_group(offloaded)
