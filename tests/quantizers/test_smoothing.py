"""Test that smoothing leaves the logits unchanged, for every fold and every architecture."""

from __future__ import annotations

import copy

import pytest
import torch

from haq_lab.calibration.hooks import captured_inputs
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.families.family import Group
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.quantizers.apply import smooth_group
from haq_lab.quantizers.base import Quantizer, Smoothing
from haq_lab.quantizers.grid import round_to_nearest, row_scale
from haq_lab.quantizers.smoothing import FLOOR, ChannelMap, fold, smoothing_factor, stack_weights
from tests.models.test_layerwise import VARIANTS, save


class RandomFactors(Quantizer):
    """Fold factors over four orders of magnitude into the groups of the given kinds."""

    def __init__(self, kinds=("norm", "value", "up")):
        object.__setattr__(self, "kinds", kinds)  # a frozen dataclass

    def smoothing(self, group, family, weight, statistics, channels):
        if group.kind not in self.kinds:
            return None
        return Smoothing(channels.shared_max(10 ** (4 * torch.rand(weight.shape[1]) - 2)), 0.5)


def smoothed_layers(model: LayeredModel, kinds: tuple[str, ...]) -> tuple[list, int]:
    quantizer = RandomFactors(kinds)
    layers, folded = [model.load_layer(index) for index in range(model.depth)], 0
    for index, layer in enumerate(layers):
        for group in model.groups_of(index):
            _, strength = smooth_group([layer], group, model.family, quantizer, None)
            folded += strength is not None
    return layers, folded


def relative(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float(difference.norm() / of.norm())


@pytest.mark.parametrize("kinds", [("norm",), ("value",), ("up",), ("norm", "value", "up")], ids="-".join)
def test_logits_are_the_same(tiny, windows, logits_of, kinds):
    before = logits_of(tiny, [tiny.load_layer(index) for index in range(tiny.depth)], windows)
    layers, folded = smoothed_layers(tiny, kinds)
    assert folded == tiny.depth * sum(group.kind in kinds for group in tiny.groups_of(0))
    assert relative(logits_of(tiny, layers, windows) - before, before) < 1e-4
    name = next(group for group in tiny.groups_of(0) if group.kind in kinds).consumers[0]
    assert not torch.equal(layers[0].get_submodule(name).weight, tiny.load_layer(0).get_submodule(name).weight)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_router_decides_as_before(tiny, windows):
    def choices(layers):
        seen, hidden = [], tiny.embed(windows)
        for index, layer in enumerate(layers):
            with captured_inputs(layer, ["mlp.gate"]) as inputs:
                hidden = tiny.forward(layer, index, hidden)
            _, weights, chosen = layer.mlp.gate(*inputs["mlp.gate"])
            seen.append((weights, chosen))
        return seen

    before = choices([tiny.load_layer(index) for index in range(tiny.depth)])
    layers, _ = smoothed_layers(tiny, ("norm", "value", "up"))
    assert not torch.equal(layers[0].mlp.gate.weight, tiny.load_layer(0).mlp.gate.weight)
    for (weights, chosen), (weights_after, chosen_after) in zip(before, choices(layers), strict=True):
        assert torch.equal(chosen, chosen_after)
        torch.testing.assert_close(weights, weights_after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["opt", "mixtral"])
def test_states_of_a_layer_that_share_tensors_are_scaled_once(tiny):
    """The up projection is already int8 in the quantised state only. The states share all other tensors."""
    layer, alone = tiny.load_layer(0), tiny.load_layer(0)
    shared = {id(tensor): tensor for tensor in layer.parameters()}
    smoothed = copy.deepcopy(layer, shared)
    assert smoothed.self_attn.q_proj.weight.data_ptr() == layer.self_attn.q_proj.weight.data_ptr()
    group = next(group for group in tiny.groups_of(0) if group.kind == "up")
    source = smoothed.get_submodule(group.source)
    scale = row_scale(source.weight, 8)
    levels, bias = round_to_nearest(source.weight, scale, 8), None if source.bias is None else source.bias.clone()
    layer.set_submodule(group.source, Int8Linear(levels, scale.clone(), bias, "token", None, ReferenceBackend()))
    channels = ChannelMap(group, layer, stack_weights(layer, group.consumers).shape[1])
    factor = torch.rand(len(channels.rows)) + 0.5

    fold([layer, smoothed], group, factor, channels)
    fold([alone], group, factor, channels)
    assert torch.equal(layer.get_submodule(group.source).weight_scale, scale / factor)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(smoothed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("variant", "sources"),
    [
        ("opt_post_norm", {"self_attn.v_proj", "fc1"}),
        ("opt_plain_norm", {"self_attn.v_proj", "fc1"}),
        ("opt_no_bias", {"self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"}),
        ("llama_biases", {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}),
        ("mistral_window", {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}),
    ],
)
def test_variants_fold_only_what_is_exact(variant, sources, windows, logits_of, tmp_path):
    model = LayeredModel(save(VARIANTS[variant], tmp_path))
    assert {group.source for group in model.groups_of(0)} - {None} == sources
    before = logits_of(model, [model.load_layer(index) for index in range(model.depth)], windows)
    layers, folded = smoothed_layers(model, ("norm", "value", "up"))
    assert folded == model.depth * len(sources)
    assert relative(logits_of(model, layers, windows) - before, before) < 1e-4


def test_every_linear_of_a_layer_is_in_exactly_one_group(tiny):
    layer = tiny.new_layer(0)
    linears = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(linears) == sorted(name for group in tiny.groups_of(0) for name in group.consumers)


@pytest.mark.parametrize("kind", ["value", "up"])
def test_folding_into_an_int8_source_scales_its_outputs(tiny, kind):
    layer = tiny.load_layer(0)
    group = next(group for group in tiny.groups_of(0) if group.kind == kind)
    source = layer.get_submodule(group.source)
    scale = row_scale(source.weight, 8)
    levels = round_to_nearest(source.weight, scale, 8)
    bias = None if source.bias is None else source.bias.clone()
    int8 = Int8Linear(levels, scale, bias, "token", None, ReferenceBackend())
    layer.set_submodule(group.source, int8)
    channels = ChannelMap(group, layer, stack_weights(layer, group.consumers).shape[1])
    factor = channels.shared_max(2.0 ** torch.randint(-4, 5, (len(channels.rows),)))  # exact in floats

    x = torch.randn(20, levels.shape[1])
    before, columns = int8(x), stack_weights(layer, group.consumers)
    fold([layer], group, factor, channels)
    assert torch.equal(int8(x) * channels.per_row(factor), before)
    assert torch.equal(stack_weights(layer, group.consumers), columns * factor)
    assert torch.equal(int8.weight, levels)


def test_query_heads_of_a_key_value_head_share_their_factor():
    model = LayeredModel(TinyModel("llama").folder())
    group = next(group for group in model.groups_of(0) if group.kind == "value")
    channels = ChannelMap(group, model.load_layer(0), 64)  # 4 query heads on 2 key-value heads, 16 channels each
    assert channels.source_rows == 32
    heads = channels.rows.view(4, 16)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert heads[0].tolist() == list(range(16))
    assert heads[2].tolist() == list(range(16, 32))
    values = torch.rand(64)
    shared = channels.shared_max(values).view(2, 2, 16)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert torch.equal(shared[:, 0], values.view(2, 2, 16).amax(dim=1))
    with pytest.raises(AssertionError, match="one factor"):
        fold([model.load_layer(0)], group, values, channels)


def test_channels_are_one_to_one_elsewhere(tiny):
    for group in tiny.groups_of(0):
        if group.kind != "value":
            values = torch.rand(64)
            channels = ChannelMap(group, tiny.new_layer(0), 64)
            assert torch.equal(channels.shared_max(values), values)
            assert torch.equal(channels.per_row(values), values)


def test_group_without_a_source_is_left_alone(tiny):
    group = Group("norm", None, tiny.groups_of(0)[0].consumers)
    layer = tiny.load_layer(0)
    before = copy.deepcopy(layer.state_dict())
    assert smooth_group([layer], group, tiny.family, RandomFactors(), None) == (None, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_factor_equals_smoothquants():
    activation, weight = torch.tensor([4.0, 100.0, 0.0]), torch.tensor([1.0, 0.25, 0.0])
    torch.testing.assert_close(smoothing_factor(activation, weight, 0.5)[:2], torch.tensor([2.0, 20.0]))
    torch.testing.assert_close(smoothing_factor(activation, weight, 1.0)[:2], activation[:2])
    torch.testing.assert_close(smoothing_factor(activation, weight, 0.0)[:2], 1 / weight[:2])
    for strength in (0.0, 0.5, 1.0):
        factor = smoothing_factor(activation, weight, strength)
        assert torch.isfinite(factor).all()
        assert (factor >= FLOOR).all()
