"""Native Mixture-of-Experts layers are bit-identical to their parts and close to the original layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.backend import Backend, PackedExpert, PackedLinear
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.models.experts import gated_by
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.deploy import deploy
from haq_lab.runtime.layer_parts import LayerParts, LinearParts, MoeParts
from haq_lab.runtime.native_decoder import MoeStack, NativeStack, make_stack
from haq_lab.runtime.native_router import NativeRouter, native_router

if not library.available():
    pytest.skip(f"no CPU kernels here: {library.unavailable_reason()}", allow_module_level=True)

isas = pytest.mark.parametrize("isa", library.isas())
SOFTMAX = ["mixtral", "qwen3_moe", "olmoe", "granitemoe"]
# A shared expert with a gate; one without, behind a router with sigmoids and groups; SparseMixer.
architectures = pytest.mark.parametrize("architecture", [*SOFTMAX, "qwen2_moe", "glm4_moe", "phimoe"])


@isas
@settings(max_examples=15, deadline=None)
@given(m=st.integers(0, 40), k=st.integers(1, 90), f=st.integers(1, 90), static=st.booleans(), seed=st.integers(0, 99))
def test_an_expert_is_bit_identical_to_its_parts(isa, m, k, f, static, seed):
    generator = torch.Generator().manual_seed(seed)
    backend, x = CpuBackend(), 3 * torch.randn(m, k, generator=generator)

    def linear(rows, columns):
        levels = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
        return PackedLinear(backend.pack(levels), 0.01 * torch.rand(rows, generator=generator) + 1e-4)

    down_reads = ("static", torch.tensor(0.02)) if static else ("token", None)
    weights = PackedExpert(linear(f, k), linear(f, k), linear(k, f), *down_reads)
    with library.forced_isa(isa):
        rows = backend.quantize(x, "token", None)
        got = backend.expert(*rows, weights)
        assert torch.equal(got, Backend.expert(backend, *rows, weights))


def test_an_expert_with_wrong_sizes_raises():
    data = native.pack(torch.ones(8, 8, dtype=torch.int8))
    ok, qx = torch.ones(8), torch.ones(2, 8, dtype=torch.int8)
    native.expert(qx, torch.ones(2), [data] * 3, [ok] * 3)
    with pytest.raises(ValueError, match="packed bytes"):
        native.expert(qx, torch.ones(2), [data] * 3, [ok, torch.ones(9), ok])
    with pytest.raises(ValueError, match="row_scale"):
        native.expert(qx, torch.ones(3), [data] * 3, [ok] * 3)


def quantised(architecture, activations="token", bits=8):
    """A tiny model, and its layers in int8, or with 4-bit weights in groups of 32."""
    model = LayeredModel(TinyModel(architecture).folder())
    windows = torch.randint(0, 257, (2, 16)) if activations == "static" else None
    layers: list[torch.nn.Module] = []
    group = "none" if bits == 8 else 32
    quantizer, policy = RTN(activations=activations, weight_bits=bits, group=group), CalibrationPolicy()
    sequential_pass(
        PassInputs(model, quantizer, CpuBackend(), windows, policy, {}), lambda index, layer: layers.append(layer)
    )
    return model, layers


@isas
@pytest.mark.parametrize("architecture", SOFTMAX)
def test_the_native_router_equals_the_models(isa, architecture):
    model = LayeredModel(TinyModel(architecture).folder())
    moe = model.family.moe
    router = model.load_layer(0).get_submodule(moe.router)
    with library.forced_isa(isa):
        made = native_router(router, moe.is_normalized(model.config), CpuBackend())
        assert made is not None
        assert native_router(router, not moe.is_normalized(model.config), CpuBackend()) is None
        x = torch.randn(200, model.config.hidden_size)
        for got, wanted in zip(made(x), router(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert [*made.state_dict()] == [*router.state_dict()]


def spread(numbers, weights, experts):
    """The weights of all experts (t, experts), zeros for those that are not chosen."""
    return torch.zeros(len(numbers), experts).scatter(1, numbers, weights)


@isas
@pytest.mark.parametrize("architecture", ["glm4_moe", "deepseek_v3", "phimoe"])
def test_routers_with_other_scores(isa, architecture):
    model = LayeredModel(TinyModel(architecture).folder())
    router = model.load_layer(1).get_submodule(model.family.moe.router)
    names = [*router.state_dict()]
    correction = getattr(router, "e_score_correction_bias", None)
    if correction is not None:
        correction.copy_(torch.linspace(-0.3, 0.3, len(correction)))
    else:
        router.router_jitter_noise = 0.3  # some logits are near enough to be mixed, others are not
    x = torch.randn(200, model.config.hidden_size)
    with library.forced_isa(isa):
        made = native_router(router, True, CpuBackend())
        assert made is not None
        assert [*made.state_dict()] == names
        (logits, weights, chosen), (wanted_logits, wanted, wanted_chosen) = made(x), router(x)
        torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=1e-5)
        got = spread(chosen, weights, logits.shape[1])
        torch.testing.assert_close(got, spread(wanted_chosen, wanted, logits.shape[1]), rtol=1e-4, atol=1e-5)
        for field, value in (
            (("correction", None), ("chosen_groups", 4)) if correction is not None else (("jitter", 0.01),)
        ):
            before = getattr(made.parts, field)
            setattr(made.parts, field, value)
            _, weights, chosen = made(x)
            assert not torch.allclose(spread(chosen, weights, logits.shape[1]), got, atol=1e-3), field
            setattr(made.parts, field, before)


def test_other_routers_are_not_replaced():
    model = LayeredModel(TinyModel("mixtral").folder())
    router = model.load_layer(0).mlp.gate
    assert native_router(torch.nn.Linear(64, 8), True, CpuBackend()) is None
    assert native_router(router.to(torch.bfloat16), True, CpuBackend()) is None
    upside_down = model.load_layer(0).mlp.gate
    plain = upside_down.forward
    upside_down.forward = lambda x: (plain(x)[0], plain(x)[1].flip(1), plain(x)[2].flip(1))
    assert native_router(upside_down, True, CpuBackend()) is None


def test_equal_and_nan_logits_are_routed():
    router = NativeRouter(torch.nn.Parameter(torch.zeros(5, 8), requires_grad=False), 3, True)
    _, weights, chosen = router(torch.ones(2, 8))
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))
    _, weights, chosen = router(torch.full((1, 8), torch.nan))
    assert len(set(chosen[0].tolist())) == 3
    assert weights.isnan().all()


@architectures
@pytest.mark.parametrize(("activations", "bits"), [("token", 8), ("static", 8), ("token", 4), ("static", 4)])
@pytest.mark.parametrize("threads", [1, 3])
def test_layers_in_one_call(architecture, activations, bits, threads):
    torch.set_num_threads(threads)
    model, layers = quantised(architecture, activations, bits)
    prompt = torch.randint(0, 257, (1, 70), generator=torch.Generator().manual_seed(1))
    wanted = model.assemble(layers)(prompt, use_cache=False).logits
    whole = deploy(model.assemble(layers), model, CpuBackend())
    (stack,) = whole.get_submodule(model.family.layers)
    assert type(stack) is NativeStack
    got = whole(prompt, use_cache=False).logits
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.02
    # The same layers with Python between their halves: to the bit, a prompt and a step.
    numbers = [index for index in range(model.depth) if model.moe_of(index) is not None]
    layers = [layers[index] for index in numbers]
    whole_parts, parts = (
        [LayerParts.of(layer, model.groups_of(numbers[0]), model.family) for layer in layers] for _ in range(2)
    )
    stack = make_stack(layers, whole_parts, 0, model.family.moe)
    assert type(stack) is NativeStack
    for part in parts:
        part.moe = MoeParts()
    halves = make_stack(layers, parts, 0, model.family.moe)
    assert type(halves) is MoeStack
    assert halves.reproduces_its_layers()
    hidden = torch.randn(1, 601, model.config.hidden_size)
    angles = torch.randn(1, 601, stack.rotary)
    kept, other = stack.new_cache(), halves.new_cache()
    for some in (slice(600), slice(600, None)):
        given = hidden[:, some], angles[:, some].cos(), angles[:, some].sin()
        assert torch.equal(stack.step(*given, kept), halves.step(*given, other))


@architectures
def test_each_layer_is_reproduced_only_with_its_norms(architecture):
    model, layers = quantised(architecture)
    deploy(model.assemble(layers), model, CpuBackend())
    layer, groups = layers[-1], model.groups_of(model.depth - 1)  # the first one may be dense
    part = LayerParts.of(layer, groups, model.family)
    assert make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers()
    part.mlp.eps = 1.0
    assert not make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers()
    part.moe = MoeParts()
    assert not make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers(), (
        "what the experts read is compared"
    )
    part = LayerParts.of(layer, groups, model.family)
    part.moe, part.attention.eps = MoeParts(), 1.0
    assert not make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers()
    part = LayerParts.of(layer, groups, model.family)
    part.residual *= 2
    assert not make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers()
    part.moe = MoeParts()
    assert not make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers()
    if model.family.head_norms:
        part = LayerParts.of(layer, groups, model.family)
        part.moe, part.keys.gain = MoeParts(), None
        assert not make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers()
    if architecture in ("qwen2_moe", "glm4_moe"):
        for field in ("gate_up", "shared_gate") if architecture == "qwen2_moe" else ("gate_up",):
            part = LayerParts.of(layer, groups, model.family)
            part.moe = MoeParts()
            assert make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers()
            setattr(part, field, LinearParts() if field == "gate_up" else None)
            assert not make_stack([layer], [part], 0, model.family.moe).reproduces_its_layers(), field


def test_other_experts_run_as_modules_after_native_attention():
    model, layers = quantised("mixtral")
    for layer in layers:
        for expert in layer.mlp.experts:
            expert.gating = gated_by(torch.nn.GELU())
    prompt = torch.randint(0, 257, (1, 40))
    wanted = model.assemble(layers)(prompt, use_cache=False).logits
    whole = deploy(model.assemble(layers), model, CpuBackend())
    assert [type(stack) for stack in whole.get_submodule(model.family.layers)] == [MoeStack]
    got = whole(prompt, use_cache=False).logits
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.02


def test_replaced_experts_are_called_as_modules():
    model, layers = quantised("mixtral")
    whole = deploy(model.assemble(layers), model, CpuBackend())
    called = []
    experts = layers[1].mlp.experts
    forward = experts.forward
    experts.forward = lambda *given: called.append(1) or forward(*given)
    whole(torch.randint(0, 257, (1, 5)), use_cache=False)
    assert called == [1]
