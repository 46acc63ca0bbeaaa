"""The native decoder computes the same as the layers, up to float32 rounding."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear, parameter_count, to_float, weight_bytes
from haq_lab.models.families.lookup import family_of
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.prefix.attention import attach
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.deploy import deploy, merge_linears
from haq_lab.runtime.layer_parts import LayerParts, LinearParts, UnsupportedLayerError
from haq_lab.runtime.native_decoder import NativeStack, make_stack, stack_native_layers

if not library.available():
    pytest.skip(f"no CPU kernels here: {library.unavailable_reason()}", allow_module_level=True)

isas = pytest.mark.parametrize("isa", library.isas())


def llama_layer(heads=6, kv_heads=2, head_dim=32, hidden=96, inner=160, backend=None, **config):
    """A quantised layer with merged linears. Its weights are small, so few values are halfway between two levels."""
    config = LlamaConfig(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=inner, attn_implementation="sdpa", **config,
    )  # fmt: skip
    backend = backend or CpuBackend()
    layer = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
    for name, module in list(layer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer.set_submodule(name, Int8Linear.rounded(module, backend))
    layer.input_layernorm.weight.uniform_(0.5, 1.5)
    groups = family_of(config).resolve(config, dict(layer.named_modules()))
    merge_linears(layer, groups)
    return layer, groups


def native_form(layer, groups):
    """The layer as a stack of one, or None if the stack does not reproduce it."""
    part = LayerParts.of(layer, groups, family_of(LlamaConfig()))
    stack = NativeStack([layer], [part], 0)
    return stack if stack.reproduces_its_layers() else None


def inputs(tokens, head_dim, hidden):
    angles = torch.randn(1, tokens, head_dim // 2).repeat(1, 1, 2)
    return torch.randn(1, tokens, hidden), (angles.cos(), angles.sin())


def agree(got, wanted, hidden):
    """Most tokens agree up to float32 rounding. In others a value is rounded to the neighbouring level."""
    error = (got - wanted).norm(dim=-1) / (wanted - hidden).norm(dim=-1)
    assert error.median() < 1e-4
    assert error.max() < 0.05


@isas
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 4, "kv_heads": 4, "head_dim": 24, "hidden": 80},
        {"heads": 12, "kv_heads": 1, "head_dim": 64, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["grouped", "ragged", "one key head, biases"],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_prompt_and_steps(isa, shape, threads):
    if shape.get("head_dim") == 24:  # 96 rows of q, k and v each: a multiple of a panel
        assert 4 * 24 % native.PANEL == 0
    layer, groups = llama_layer(**shape)
    fused = native_form(layer, groups)
    assert fused is not None
    hidden, (cosines, sines) = inputs(200, fused.head_dim, shape.get("hidden", 96))
    wanted = layer(hidden.clone(), position_embeddings=(cosines, sines), attention_mask=None)
    torch.set_num_threads(threads)
    with library.forced_isa(isa):
        agree(fused(hidden, position_embeddings=(cosines, sines)), wanted, hidden)
        kept, parts = fused.new_cache(), []
        for part in (slice(0, 1), slice(1, 190), *(slice(i, i + 1) for i in range(190, 200))):
            parts.append(fused.step(hidden[:, part], cosines[:, part], sines[:, part], kept))
        assert kept.get_seq_length() == 200
        agree(torch.cat(parts, 1), wanted, hidden)


@isas
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norms(isa, bias):
    layer, groups = llama_layer(hidden=84)  # not a multiple of 16, the numbers in a vector
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = torch.nn.LayerNorm(84, eps=0.1, bias=bias).requires_grad_(False)
        for parameter in norm.parameters():
            parameter.uniform_(-1.5, 1.5)
        setattr(layer, name, norm)
    part = LayerParts.of(layer, groups, family_of(LlamaConfig()))
    hidden, positions = inputs(50, 32, 84)
    hidden = hidden + 3  # the mean is subtracted
    wanted = layer(hidden.clone(), position_embeddings=positions, attention_mask=None)
    with library.forced_isa(isa):
        fused = NativeStack([layer], [part], 0)
        assert fused.reproduces_its_layers()
        agree(fused(hidden, position_embeddings=positions), wanted, hidden)
        part.attention.eps = 0.0
        assert not NativeStack([layer], [part], 0).reproduces_its_layers()


def first_layer(architecture):
    """The first layer of a small model with merged linears, its parts, and the names of its experts."""
    model, layers = LayeredModel(TinyModel(architecture, layers=2, hidden=64).folder()), []
    inputs = PassInputs(model, RTN(), CpuBackend(), None, CalibrationPolicy(), {})
    sequential_pass(inputs, lambda index, layer: layers.append(layer))
    merge_linears(layers[0], model.groups_of(0))
    return layers[0], LayerParts.of(layers[0], model.groups_of(0), model.family), model.family.moe


@isas
def test_sinks_take_a_share_of_the_attention(isa):
    layer, parts, moe = first_layer("gpt_oss")
    layer.self_attn.sinks.copy_(torch.tensor([-30.0, 0.0, 2.0, 9.0]))  # below all scores, among them, above them
    with library.forced_isa(isa):
        assert make_stack([layer], [parts], 0, moe).reproduces_its_layers()
        parts.sinks = None
        assert not make_stack([layer], [parts], 0, moe).reproduces_its_layers()


def test_sinks_of_another_type_are_not_native():
    layer, _, _ = first_layer("gpt_oss")
    model = LayeredModel(TinyModel("gpt_oss", layers=2, hidden=64).folder())
    layer.self_attn.sinks.data = layer.self_attn.sinks.data.half()
    with pytest.raises(UnsupportedLayerError, match="sinks are not one float32 number for each head"):
        LayerParts.of(layer, model.groups_of(0), model.family)


@isas
def test_neighbouring_channels_may_turn_together(isa):
    layer, parts, moe = first_layer("glm4")
    with library.forced_isa(isa):
        assert not make_stack([layer], [parts], 0, moe).reproduces_its_layers()
        parts.pairs = True
        assert make_stack([layer], [parts], 0, moe).reproduces_its_layers()


@isas
@pytest.mark.parametrize("architecture", ["starcoder2", "opt"])  # GELU and ReLU, with and without rotation
def test_an_mlp_without_a_gate(isa, architecture):
    layer, parts, moe = first_layer(architecture)
    with library.forced_isa(isa):
        assert make_stack([layer], [parts], 0, moe).reproduces_its_layers()


def test_long_prompts():
    layer, groups = llama_layer()
    fused = native_form(layer, groups)
    hidden, positions = inputs(700, 32, 96)
    wanted = layer(hidden.clone(), position_embeddings=positions, attention_mask=None)
    agree(fused(hidden, position_embeddings=positions), wanted, hidden)


def test_a_layer_with_another_activation_is_not_native():
    layer, groups = llama_layer(hidden_act="gelu")
    with pytest.raises(UnsupportedLayerError, match="activation is not SiLU, ReLU or GELU"):
        native_form(layer, groups)


def test_a_layer_with_another_residual_is_not_native():
    """The outputs are compared: nothing in the layer's attributes says what this forward does."""
    layer, groups = llama_layer()
    assert native_form(layer, groups) is not None
    whole = type(layer).forward
    layer.forward = lambda hidden, **others: hidden + 0.9 * (whole(layer, hidden, **others) - hidden)
    assert native_form(layer, groups) is None


def reference_backend():
    return llama_layer(backend=ReferenceBackend())


def one_scale_per_tensor():
    layer, groups = llama_layer()
    layer.self_attn.o_proj.scheme = "tensor"
    return layer, groups


def no_mlp_output():
    layer, groups = llama_layer()
    return layer, groups[:-1]


def float_linear():
    layer, groups = llama_layer()
    layer.mlp.down_proj = torch.nn.Linear(160, 96, bias=False)
    return layer, groups


def half_norm():
    layer, groups = llama_layer()
    layer.input_layernorm.to(torch.bfloat16)
    return layer, groups


class Peak(torch.nn.Module):
    """A norm that divides by the largest magnitude."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(width), requires_grad=False), 1e-6

    def forward(self, x):
        return self.weight * x / x.abs().amax(-1, keepdim=True)


def other_norm():
    layer, groups = llama_layer()
    layer.input_layernorm = Peak(96)
    return layer, groups


def separate_linears():
    layer, groups = llama_layer()
    layer.mlp.up_proj.merged = None
    return layer, groups


def sliding_window():
    layer, groups = llama_layer()
    layer.self_attn.sliding_window = 16
    attach(layer.self_attn, torch.zeros(2, 3, 32), torch.zeros(2, 3, 32))
    return layer, groups


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (reference_backend, r"self_attn.q_proj is not in the native .* \(backend=reference does not use"),
        (one_scale_per_tensor, "self_attn.o_proj quantises its input with one scale per sequence"),
        (no_mlp_output, "not a norm and attention followed by"),
        (float_linear, "mlp.down_proj is not an int8 linear"),
        (half_norm, "input_layernorm has weights of type torch.bfloat16, not float32"),
        (other_norm, "input_layernorm is neither an RMSNorm nor a LayerNorm"),
        (separate_linears, "mlp.gate_proj, mlp.up_proj cannot be merged into one product"),
        (sliding_window, "self_attn has a sliding window and a prefix"),
    ],
)
def test_a_layer_that_is_not_native_has_a_reason(make, reason):
    layer, groups = make()
    with pytest.raises(UnsupportedLayerError, match=reason):
        LayerParts.of(layer, groups, family_of(LlamaConfig()))


def norm_in_layer_1(layers):
    layers[1].input_layernorm = Peak(64)


def gelu_in_all_layers(layers):
    for layer in layers:
        layer.mlp.act_fn = torch.nn.GELU()


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        (
            norm_in_layer_1,
            "native decoder not used for 1 of 2 layers: layer 1: input_layernorm is neither an RMSNorm nor a LayerNorm",
        ),
        (
            gelu_in_all_layers,
            "native decoder not used: layer 0: its MLP's activation is not SiLU, ReLU or GELU's tanh form",
        ),
        (lambda layers: None, None),
    ],
)
def test_deploying_reports_why_layers_are_not_native(change, notice):
    model, lines = LayeredModel(TinyModel("llama").folder()), []
    layers: list[torch.nn.Module] = []
    inputs = PassInputs(model, RTN(), CpuBackend(), None, "fp", {})
    sequential_pass(inputs, lambda index, layer: layers.append(layer))
    change(layers)
    deploy(model.assemble(layers), model, CpuBackend(), lines.append)
    assert lines == ([notice] if notice else [])


def test_a_backend_that_is_not_native_is_reported():
    model, lines = LayeredModel(TinyModel("llama").folder()), []
    layers = [model.load_layer(index) for index in range(model.depth)]
    deploy(model.assemble(layers), model, ReferenceBackend(), lines.append)
    assert lines == ["native decoder not used: backend=reference does not use the native CPU kernels"]


def test_runs_of_native_layers_are_stacked():
    layers = [torch.nn.Linear(1, 1) for _ in range(6)]
    one, other = (LayerParts(heads=4, kv_heads=heads, head_dim=32, gate_up=LinearParts(packed=1)) for heads in (2, 4))
    result = stack_native_layers(layers, [one, one, None, one, other, other])
    assert [[*stack.layers] if isinstance(stack, NativeStack) else stack for stack in result] == [
        layers[:2],
        layers[2],
        layers[3:4],
        layers[4:],
    ]
    assert [stack.first for stack in result if isinstance(stack, NativeStack)] == [0, 3, 4]
    assert stack_native_layers(layers, [None] * 6) == layers


def test_layers_of_several_kinds_stay_at_their_place():
    """A model chooses the arguments of a call by the layer's index, so a module must be where its first layer was."""
    layers = [torch.nn.Linear(1, 1) for _ in range(6)]
    part = LayerParts(heads=4, kv_heads=2, head_dim=32, gate_up=LinearParts(packed=1))
    kinds = ["sliding", "sliding", "full", "full", "sliding", "sliding"]
    result = stack_native_layers(layers, [part] * 4 + [None, None], kinds=kinds)
    stacks = [stack for stack in result if isinstance(stack, NativeStack)]
    assert [[*stack.layers] for stack in stacks] == [layers[:2], layers[2:4]]
    assert [result.index(stack) for stack in stacks] == [stack.first for stack in stacks] == [0, 2]
    assert result[4:] == layers[4:]
    assert len(stack_native_layers(layers, [part] * 6, kinds=["full"] * 6)) == 1


def test_static_scales():
    layer, groups = llama_layer()
    for linear in layer.modules():
        if isinstance(linear, Int8Linear):
            linear.scheme, linear.input_scale = "static", torch.tensor(0.03)
            if linear.merged is not None:
                linear.merged.scheme, linear.merged.input_scale = "static", linear.input_scale
    assert native_form(layer, groups) is not None


@pytest.fixture
def pair():
    """A tiny quantised Llama, not deployed and deployed."""
    model = LayeredModel(TinyModel("llama", hidden=128).folder())
    wholes = []
    for _ in range(2):
        layers: list[torch.nn.Module] = []
        sequential_pass(
            PassInputs(model, RTN(), CpuBackend(), None, "fp", {}),
            lambda index, layer, layers=layers: layers.append(layer),
        )
        wholes.append(model.assemble(layers))
    size = weight_bytes(wholes[1]), parameter_count(wholes[1])
    deploy(wholes[1], model, CpuBackend())
    assert (weight_bytes(wholes[1]), parameter_count(wholes[1])) == size
    (stack,) = wholes[1].get_submodule(model.family.layers)
    assert isinstance(stack, NativeStack)
    assert len(stack.layers) == model.depth
    return wholes


def close(a, b):
    """Check that logits of a two-layer model are close. Rounding to a neighbouring level is rare and small."""
    assert (a - b).norm() / a.norm() < 0.02


def test_generation_is_the_same(pair):
    plain, deployed = pair
    prompt = torch.randint(0, 257, (1, 60))
    a, b = plain(prompt, use_cache=True), deployed(prompt, use_cache=True)
    close(a.logits, b.logits)
    for token in range(4):
        tokens = torch.tensor([[token]])
        a, b = plain(tokens, cache=a.cache, use_cache=True), deployed(tokens, cache=b.cache, use_cache=True)
        close(a.logits, b.logits)
    assert b.cache.get_seq_length() == 64


def test_a_rounded_linear_is_int8():
    head = torch.nn.Linear(64, 257, bias=False)
    small = Int8Linear.rounded(head, CpuBackend())
    torch.testing.assert_close(to_float(small), head.weight, atol=float(head.weight.abs().max()) / 250, rtol=0)
    assert small.weight.dtype == torch.int8
