"""Matrices that differ only by float32 rounding are nearly equal. Layers that compute alike have one key."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from haq_lab.int8.numerics import quantize_activations
from haq_lab.runtime.equivalence import computation_key, make_probe, nearly_equal

ROWS = quantize_activations(make_probe(64, torch.device("cpu")), "token", None)


def changed(beside: int = 0, by: int = 1, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    levels = ROWS[0].clone()
    levels.view(-1)[:beside] += torch.where(levels.view(-1)[:beside] > 0, -by, by).to(torch.int8)
    return levels, ROWS[1].flatten() * scale


@pytest.mark.parametrize("change", [{}, {"beside": 10}, {"scale": 1 + 5e-6}])
def test_rounding_differences_are_accepted(change):
    assert nearly_equal(changed(**change), ROWS)


@pytest.mark.parametrize("change", [{"beside": 1, "by": 2}, {"beside": 11}, {"scale": 1 + 2e-5}])
def test_larger_differences_are_rejected(change):
    assert not nearly_equal(changed(**change), ROWS)


def test_probe_rows_have_very_different_magnitudes():
    sizes = make_probe(64, torch.device("cpu")).norm(dim=1)
    assert sizes[0] < 1e-2
    assert sizes[-1] > 1e2
    assert torch.equal(make_probe(64, torch.device("cpu")), make_probe(64, torch.device("cpu")))


def llama_layer(index: int = 0, **config) -> LlamaDecoderLayer:
    return LlamaDecoderLayer(LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, **config), index)


def test_weights_and_index_do_not_change_the_key():
    assert computation_key(llama_layer(0)) == computation_key(llama_layer(5))


@pytest.mark.parametrize("config", [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"num_key_value_heads": 2}])
def test_another_config_changes_the_key(config):
    assert computation_key(llama_layer()) != computation_key(llama_layer(**config))


@pytest.mark.parametrize(
    ("module", "attribute", "value"),
    [
        ("self_attn", "scaling", 0.5),
        ("self_attn", "sliding_window", 8),
        ("mlp", "act_fn", torch.nn.GELU()),
        ("mlp", "forward", lambda x: x),
        ("input_layernorm", "weight", torch.nn.Parameter(torch.ones(32, dtype=torch.bfloat16))),
    ],
)
def test_a_changed_part_changes_the_key(module, attribute, value):
    layer = llama_layer()
    setattr(layer.get_submodule(module), attribute, value)
    assert computation_key(layer) != computation_key(llama_layer())
