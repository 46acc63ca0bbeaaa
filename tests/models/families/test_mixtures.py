"""What only the Mixtures of Experts have: layers of different kinds, shared experts, routing, and offloading."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import TINY, launch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3MoeConfig
from two_tiers import NEAREST, decoded, finished

from haq_lab.calibration.hooks import captured_inputs
from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear, to_float
from haq_lab.models.families.float_share import FloatShare
from haq_lab.models.families.lookup import FAMILIES
from haq_lab.models.families.tiny import tiny_fields
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.random_tiny import byte_tokenizer
from haq_lab.models.sources import HubModel, TinyModel
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.session import OffloadSession
from haq_lab.offload.settings import Offload
from haq_lab.pipeline.preflight import measure_size
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.quantizers.smoothquant import SmoothQuant
from haq_lab.result_cache.store import Store
from haq_lab.routing.record import record_trace
from haq_lab.runtime.deploy import deploy
from haq_lab.utils.errors import UserError
from haq_lab.utils.hugging_face import quiet_transformers
from tests.models.test_layerwise import whole_of
from tests.quantizers.test_rotation import Unrounded, UnroundedBackend, rotated_layers
from tests.quantizers.test_smoothing import relative, smoothed_layers

MIXTURES = sorted(family.model_type for family in FAMILIES if family.moe is not None)
DENSE_BETWEEN = "dense_between"
PROMPT = torch.arange(8)[None]
every_mixture = pytest.mark.parametrize("architecture", [*MIXTURES, DENSE_BETWEEN])
SHARED = {"qwen2_moe": "shared_expert", "deepseek_v3": "shared_experts", "glm4_moe": "shared_experts"}


def dense_between(folder: Path, dense: tuple[int, ...] = (1,)) -> Path:
    """Write a Qwen3-MoE whose layers `dense` have no experts."""
    config = Qwen3MoeConfig(**tiny_fields("qwen3_moe", 3, 32), intermediate_size=48, mlp_only_layers=list(dense))
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(architecture, tmp_path) -> LayeredModel:
    if architecture == DENSE_BETWEEN:
        return LayeredModel(dense_between(tmp_path / "model"))
    return LayeredModel(TinyModel(architecture).folder())


@pytest.mark.parametrize("architecture", [DENSE_BETWEEN])
def test_layers_may_be_dense_between_mixtures(model, windows, logits_of):
    assert model.kinds.moe_layers == (0, 2)
    assert [group.source for group in model.groups_of(1)][2:] == ["post_attention_layernorm", "mlp.up_proj"]
    assert model.moe_of(1) is None
    assert model.moe_of(2) is model.family.moe
    layers = [model.load_layer(index) for index in range(3)]
    expected = whole_of(model.folder)(windows).logits
    torch.testing.assert_close(logits_of(model, layers, windows), expected, rtol=1e-5, atol=1e-4)


@every_mixture
def test_every_linear_of_the_layers_is_named(model):
    for index in range(model.depth):
        readers = {name for group in model.groups_of(index) for name in group.readers}
        linears = {name for name, module in model.new_layer(index).named_modules() if isinstance(module, nn.Linear)}
        assert linears <= readers | {*model.family.in_float}


def test_a_linear_that_no_row_names_is_refused(tmp_path, monkeypatch):
    model = LayeredModel(dense_between(tmp_path))
    rows = tuple(group for group in model.family.groups if "mlp.down_proj" not in group.consumers)
    monkeypatch.setattr(model.kinds, "_family", replace(model.family, groups=rows))
    with pytest.raises(UserError, match=r"'mlp.down_proj' of layer 1 is not in the family table's row of 'qwen3_moe'"):
        model.groups_of(1)


def _choices(model: LayeredModel, layers: list[nn.Module], windows: torch.Tensor) -> list[torch.Tensor]:
    """The experts that the router of each layer chooses, in one pass through the layers."""
    hidden, chosen = model.embed(windows), []
    for index, layer in enumerate(layers):
        moe = model.moe_of(index)
        if moe is None:
            model.run(layer, index, hidden)
            continue
        with captured_inputs(layer, [moe.experts]) as inputs:
            hidden = model.forward(layer, index, hidden)
        chosen.append(inputs[moe.experts][1].sort(dim=1)[0])
    return chosen


@every_mixture
def test_smoothing_and_rotation_do_not_change_the_routers_choice(model, windows):
    windows = windows[:2]
    before = _choices(model, [model.load_layer(index) for index in range(model.depth)], windows)
    smoothed, _ = smoothed_layers(model, ("norm", "value", "up"))
    rotated = rotated_layers(model, Unrounded("block", 16), UnroundedBackend())
    assert len(before) == len(model.kinds.moe_layers)
    for layers in (smoothed, rotated):
        for one, other in zip(before, _choices(model, layers, windows), strict=True):
            assert (one == other).float().mean() > 0.999, "but for ties that float32 rounding decides"


@pytest.mark.parametrize("architecture", SHARED)
def test_the_shared_expert_gets_the_factor_of_the_routed_ones(model, windows):
    index = model.kinds.moe_layers[0]
    group = next(group for group in model.groups_of(index) if group.feeds_experts)
    shared = f"mlp.{SHARED[model.family.model_type]}.gate_proj"
    assert {shared, "mlp.experts.0.gate_proj"} <= {*group.consumers}
    before = model.load_layer(index)
    layers: list[nn.Module] = []
    inputs = PassInputs(model, SmoothQuant(), ReferenceBackend(), windows, CalibrationPolicy(), {"text": windows})
    result = sequential_pass(inputs, lambda index, layer: layers.append(layer))
    router, *others = (
        layers[index].get_submodule(name).weight / before.get_submodule(name).weight for name in group.float_consumers
    )
    assert not torch.allclose(router[0], torch.ones_like(router[0]))
    for other in others:
        torch.testing.assert_close(other[0], router[0])
    for name in group.consumers:
        smoothed = before.get_submodule(name).weight * router[0]
        error = (to_float(layers[index].get_submodule(name)) - smoothed).abs().amax(dim=1)
        assert (error <= smoothed.abs().amax(dim=1) / 127).all(), f"the columns of {name} have the factor"
    forms = {layers[index].get_submodule(name).input_quantization for name in group.consumers}
    assert len(forms) == 1, "the input is quantised once for all"
    strengths = {report.smoothing_strength for report in result.reports if report.linear in group.consumers}
    assert strengths == {0.8}


@every_mixture
@pytest.mark.parametrize("eviction", ["lru", pytest.param("haq", marks=pytest.mark.slow)])
def test_offloading_does_not_change_a_bit(model, eviction, tmp_path, windows):
    """The shared experts and the dense layers stay in memory."""
    layers = finished(model)
    expected = decoded(deploy(model.assemble(layers), model, CpuBackend()), PROMPT, steps=4)
    settings = Offload(budget=4, spare=2, eviction=eviction, placement="frequency", prefetch="next_gate")
    session = OffloadSession(settings, None, model, tmp_path / "experts", Store())
    layers = finished(model, session.add)
    experts = len(model.kinds.moe_layers) * model.experts
    held = [module for layer in layers for module in layer.modules() if isinstance(module, Int8Linear)]
    assert sum(not linear.packed.numel() for linear in held) == 3 * experts
    session.find_profile(None, windows, "random")
    whole = deploy(model.assemble(layers), model, CpuBackend())
    session.engage(layers)
    assert torch.equal(decoded(whole, PROMPT, steps=4), expected)
    metrics = session.metrics()
    assert 0 < metrics["offload.hit_rate_pairs"] <= 1
    assert session.table().layer.tolist() == list(model.kinds.moe_layers)
    session.close()


@pytest.mark.parametrize("architecture", ["gpt_oss"])
@pytest.mark.parametrize("quantised", [True, False])
def test_biases_move_with_16_bit_experts(model, quantised, tmp_path, windows):
    quantizer = NEAREST if quantised else None
    expected = decoded(model.assemble(finished(model, quantizer=quantizer)), PROMPT, steps=4)
    settings = Offload(budget=4, spare=2, eviction="lru", placement="frequency", device_format="fp16")
    session = OffloadSession(settings, None, model, tmp_path / "experts", Store())
    layers = finished(model, session.add, quantizer)
    session.find_profile(None, windows, "random")
    session.engage(layers)
    difference = relative(decoded(model.assemble(layers), PROMPT, steps=4) - expected, expected)
    for number in session.residents()[0].nonzero()[0].tolist():
        bias = model.load_layer(0).mlp.experts[number].up_proj.bias
        assert torch.equal(layers[0].mlp.experts[number].up_proj.bias, bias.half())
    session.close()
    assert difference < (0.1 if quantised else 0.01), "16-bit experts do not quantise their inputs"


@every_mixture
def test_sizes_are_those_of_the_model(model):
    """Budgets and plans count the shared experts and the dense layers."""
    shape, size = Shape.of(model.config), measure_size(model.config)
    layers = [model.kinds.build(index) for index in range(model.depth)]
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)
    assert 0 <= shape.layers * (shape.experts * shape.expert + shape.rest) - weights < shape.layers
    assert size.layers == sum(p.numel() for layer in layers for p in layer.parameters())
    assert size.experts == shape.layers * shape.experts
    cache = whole_of(model.folder)(torch.arange(5)[None], use_cache=True).cache
    states = [x for layer in cache.layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    assert shape.kv_per_token * 5 == sum(x.numel() for x in states if x is not None)


@every_mixture
def test_a_run_says_what_stays_in_float(model):
    share = FloatShare.of(model.kinds, model.depth)
    total = sum(p.numel() for index in range(model.depth) for p in model.kinds.build(index).parameters())
    quantised = 0
    for layer in finished(model):
        linears = [module for module in layer.modules() if isinstance(module, Int8Linear)]
        quantised += sum(m.out_features * m.in_features + (0 if m.bias is None else m.bias.numel()) for m in linears)
    assert share.parameters == total
    assert sum(share.by_module.values()) == total - quantised
    assert model.family.moe.router.rpartition(".")[2] in str(share)


@pytest.mark.parametrize("architecture", [DENSE_BETWEEN, "deepseek_v3", "lfm2_moe"])
def test_traces_have_the_layers_with_experts(model, windows):
    """The choice with the largest weight comes first, in whatever order the router returns them."""
    inputs = PassInputs(model, HAQ(sensitivity=0), ReferenceBackend(), windows, CalibrationPolicy(inputs="fp"), {})
    routing = sequential_pass(inputs, lambda *_: None).routing
    trace = record_trace(model, windows, "random")
    calibrated = routing.trace("model", "random")
    assert trace.layers == calibrated.layers == len(model.kinds.moe_layers)
    assert (trace.experts == calibrated.experts).mean() > 0.999
    assert (trace.weights[..., :-1] >= trace.weights[..., 1:]).all()
    assert sorted(routing.table().layer.unique()) == list(model.kinds.moe_layers)
    assert math.isclose(routing.table().share.sum(), trace.layers)


@pytest.mark.parametrize("architecture", ["gpt_oss"])
def test_the_experts_of_gpt_oss_are_not_a_swiglu(model):
    """They have biases and a clamped activation, so the kernels' SwiGLU must not be used."""
    layers = finished(model)
    deploy(model.assemble(layers), model, CpuBackend())
    experts = layers[0].mlp.experts
    assert isinstance(experts, Int8Experts)
    assert not experts.swiglu
    assert all(projection.bias is not None for projection in (experts[0].gate_proj, experts[0].down_proj))


@pytest.mark.parametrize("architecture", ["deepseek_v2", "gpt_oss", "lfm2_moe"])
def test_a_prefix_is_refused_where_keys_and_values_are_unusual(architecture, tmp_path):
    model = ["model=tiny", f"model.architecture={architecture}", "quantizer.prefix=a"]
    outcome = launch(*TINY, *model, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert f"quantizer.prefix: a '{architecture}' takes no prefix" in outcome.err


def test_variants_that_no_row_describes_are_refused(tmp_path):
    fields = tiny_fields("lfm2_moe", 2, 64) | {"conv_bias": True}
    AutoConfig.for_model("lfm2_moe", **fields).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="conv_bias=True"):
        LayeredModel(tmp_path)


def test_the_language_model_of_a_multimodal_checkpoint_is_read(tmp_path, windows, logits_of):
    """Its other tensors are not read, so they are in no checkpoint either."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    text = tiny_fields("qwen3_5_moe_text", 2, 64)
    config = AutoConfig.for_model("qwen3_5_moe", text_config=text, vision_config=vision)
    with quiet_transformers():
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = LayeredModel(tmp_path)
    assert model.family.model_type == "qwen3_5_moe_text"
    assert HubModel(str(tmp_path)).config().model_type == "qwen3_5_moe_text"
    assert set(model.read_outer_tensors()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    layers = [model.load_layer(index) for index in range(model.depth)]
    expected = whole_of(tmp_path)(windows).logits
    torch.testing.assert_close(logits_of(model, layers, windows), expected, rtol=1e-5, atol=1e-4)


def gemma(folder, **fields) -> Path:
    """Save a Gemma 4 with a vision tower. Return its folder."""
    vision = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "head_dim": 16,
    }
    text = tiny_fields("gemma4_text", 2, 64) | fields
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=vision, audio_config=None)
    with quiet_transformers():
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("experts", [True, False])
def test_gemma_4_with_and_without_experts(experts, tmp_path, windows, logits_of):
    model = LayeredModel(gemma(tmp_path, enable_moe_block=experts))
    assert model.experts == (6 if experts else 0)
    layers = [model.load_layer(index) for index in range(model.depth)]
    expected = whole_of(tmp_path)(windows).logits
    torch.testing.assert_close(logits_of(model, layers, windows), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.assemble(layers)(windows).logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("field", ["hidden_size_per_layer_input", "num_kv_shared_layers"])
def test_gemma_4_whose_layers_cannot_run_alone_is_refused(field, tmp_path):
    value = {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}[field]
    fields = tiny_fields("gemma4_text", 4, 64) | {field: value}
    AutoConfig.for_model("gemma4_text", **fields).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{field}={value}. Choose a model with {field}=0"):
        LayeredModel(tmp_path)


def test_a_mixture_without_experts_is_a_dense_model(tmp_path, windows):
    model = LayeredModel(dense_between(tmp_path, dense=(0, 1, 2)))
    assert model.experts == 0
    assert (
        sequential_pass(
            PassInputs(model, SmoothQuant(), ReferenceBackend(), windows, CalibrationPolicy(), {}), lambda *_: None
        ).routing
        is None
    )
    with pytest.raises(UserError, match="has no experts to offload"):
        OffloadSession(Offload(), None, model, tmp_path, Store())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_names_convert_both_ways(model):
    for name in model.weights.names():
        assert model.family.checkpoint_name(model.family.module_name(name)) == name
