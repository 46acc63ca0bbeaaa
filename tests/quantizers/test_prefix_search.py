"""The search finds the tokens with extreme activations, and chooses a prefix only if it helps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from haq_lab.calibration.prefix_states import compute_prefix
from haq_lab.calibration.sensitivity import measure_sensitivity
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.random_tiny import byte_tokenizer
from haq_lab.quantizers.prefix_search import Effect, candidates, choose, measure_effect
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.hugging_face import quiet_transformers
from tests.models.test_layerwise import SMALL

OUTLIER = 77  # token with an extreme input of layer 0's down projection


def effect(error, *tokens):
    return Effect(tokens, error, 0, [])


def test_a_prefix_must_lower_the_error_clearly():
    bare = effect(1.0)
    assert choose(bare, []) is bare
    assert choose(bare, [effect(0.95, 1), effect(1.2, 2)]) is bare
    assert choose(bare, [effect(0.6, 1), effect(0.5, 2)]).tokens == (2,)
    assert choose(bare, [effect(0.504, 1), effect(0.5, 2)]).tokens == (1,), "the first of ties"


def test_candidates():
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, encode=lambda text, add_special_tokens: [9])
    assert candidates(tokenizer, [], 4) == [(9,), (1,), (2,)]
    assert candidates(tokenizer, [(30, 5), (9, 4), (31, 3), (32, 1)], 4) == [(9,), (1,), (2,), (30,), (30, 9, 31, 1)]
    assert candidates(tokenizer, [(30, 5), (9, 4)], 2) == [(9,), (1,), (2,), (30,)], "no room for three"
    assert candidates(tokenizer, [(30, 5)], 0) == []
    two = SimpleNamespace(bos_token_id=None, eos_token_id=2, encode=lambda text, add_special_tokens: [9, 8])
    assert candidates(two, [], 4) == [(2,)], "a newline of two tokens is none"


@pytest.fixture
def planted(tmp_path) -> LayeredModel:
    """A Llama in which the token OUTLIER has an extreme input of layer 0's down projection."""
    config = LlamaConfig(**SMALL, intermediate_size=96, mlp_bias=True, initializer_range=0.1)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layer, direction = model.model.layers[0], model.model.embed_tokens.weight[OUTLIER]
    layer.self_attn.o_proj.weight.zero_()  # the MLP then reads the token's own embedding
    unit = direction / direction.norm()
    layer.mlp.gate_proj.weight[0] = layer.mlp.up_proj.weight[0] = 100 * unit
    layer.mlp.gate_proj.bias[0] = -600.0  # the norm of an input is 8; only OUTLIER's product is above 0.75 of 800
    layer.mlp.down_proj.weight[:, 0] *= 1e-6
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return LayeredModel(tmp_path)


@pytest.mark.parametrize("scheme", ["static", "token", "tensor"])
def test_outlier_tokens_are_found(planted, windows, scheme):
    windows = windows.clone()
    windows[windows == OUTLIER] = 0
    windows[0, 5] = windows[2, 7] = windows[3, 0] = OUTLIER
    costs = measure_sensitivity(planted, windows, HiddenStateBuffer(limit=0))
    found = measure_effect(planted, windows, scheme, costs)
    assert (found.at_start, found.elsewhere, found.tokens) == (1, [(OUTLIER, 2)], ())
    windows[windows == OUTLIER] = 0
    fewer = measure_effect(planted, windows, scheme, costs)
    assert (fewer.at_start, fewer.elsewhere) == (0, [])
    if scheme != "token":
        assert fewer.error < found.error


def test_every_architecture_has_an_effect_behind_a_prefix(tiny, windows):
    costs = measure_sensitivity(tiny, windows, HiddenStateBuffer(limit=0))
    bare = measure_effect(tiny, windows, "static", costs)
    behind = measure_effect(tiny.with_prefix(compute_prefix(tiny, (3,), "")), windows, "static", costs)
    assert behind.tokens == (3,)
    assert 0 < behind.error != bare.error > 0
