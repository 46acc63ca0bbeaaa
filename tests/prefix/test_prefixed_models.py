"""A prefixed model gives the logits that transformers' own model gives for the prefix and the tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, StaticCache

from haq_lab.calibration.prefix_states import compute_prefix
from haq_lab.models.layerwise import LayeredModel
from haq_lab.prefix.attention import attached, detached
from haq_lab.prefix.positions import number_padded_batches
from tests.models.test_layerwise import VARIANTS, save, whole_of

TOKENS = (7, 9, 250)
FAMILIES = ("opt_post_norm", "opt_no_bias", "llama_biases")  # besides those of the fixture `tiny`
LENGTHS = (20, 1, 33)


def prefixed(model: LayeredModel, tokens=TOKENS) -> LayeredModel:
    return model.with_prefix(compute_prefix(model, tokens, "text"))


def layers_of(model: LayeredModel) -> list[torch.nn.Module]:
    return [model.load_layer(index) for index in range(model.depth)]


def assembled(model: LayeredModel) -> torch.nn.Module:
    whole = model.assemble(layers_of(model))
    whole.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, do_sample=False)
    return whole


def behind(windows: torch.Tensor, tokens=TOKENS) -> torch.Tensor:
    return torch.cat([torch.tensor([tokens]).expand(len(windows), -1), windows], dim=1)


def wanted(model: LayeredModel, windows: torch.Tensor) -> torch.Tensor:
    return whole_of(model.folder)(behind(windows)).logits[:, len(TOKENS) :]


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-4)


def test_logits_equal_those_of_the_prefix_and_the_tokens(tiny, windows, logits_of):
    model, expected = prefixed(tiny), wanted(tiny, windows)
    same(logits_of(model, layers_of(model), windows), expected)
    same(assembled(model)(windows).logits, expected)
    assert (whole_of(tiny.folder)(windows).logits - expected).abs().max() > 0.1, "the prefix matters"


@pytest.mark.parametrize("variant", FAMILIES)
def test_variants(variant, windows, logits_of, tmp_path):
    model = LayeredModel(save(VARIANTS[variant], tmp_path))
    behind_prefix = prefixed(model)
    same(logits_of(behind_prefix, layers_of(behind_prefix), windows), wanted(model, windows))


def test_a_sliding_window_hides_tokens_but_not_the_prefix(windows, logits_of, tmp_path):
    model = LayeredModel(save(VARIANTS["mistral_window"], tmp_path))
    with_prefix = prefixed(model)
    count, width, p = windows.shape[1], model.config.sliding_window, len(TOKENS)
    place = torch.arange(p + count)
    apart = place[:, None] - place
    visible = (apart >= 0) & ((apart < width) | (place < p))
    mask = visible[None, None].expand(len(windows), -1, -1, -1)
    expected = whole_of(tmp_path)(behind(windows), attention_mask=mask).logits[:, p:]
    same(logits_of(with_prefix, layers_of(with_prefix), windows), expected)
    whole = assembled(with_prefix)
    first = whole(windows[:, :30], use_cache=True)
    rest = whole(windows[:, 30:], cache=first.cache, use_cache=True).logits
    same(torch.cat([first.logits, rest], dim=1), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("numbered", [False, True])
def test_a_padded_batch_equals_single_sequences(tiny, windows, side, numbered):
    whole, width = assembled(prefixed(tiny)), max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    places = [slice(width - n, width) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, (place, length) in enumerate(zip(places, LENGTHS, strict=True)):
        ids[row, place], mask[row, place] = windows[row, :length], 1
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if numbered else {}
    logits = whole(ids, attention_mask=mask, **positions).logits
    for row, (place, length) in enumerate(zip(places, LENGTHS, strict=True)):
        same(logits[row, place], whole(windows[row : row + 1, :length]).logits[0])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_equals_generating_behind_the_prefix(tiny, windows, settings):
    reference = whole_of(tiny.folder)
    reference.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, do_sample=False)
    prompt = windows[:2, :12]
    got = assembled(prefixed(tiny)).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, **settings
    )
    settings = settings if "num_beams" in settings else {}
    longer = behind(prompt)
    expected = reference.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=8, **settings)
    assert torch.equal(got[:, 12:], expected[:, 12 + len(TOKENS) :])


@pytest.mark.parametrize("architecture", ["llama"])
def test_an_empty_static_cache_may_have_free_places(tiny, windows):
    whole = assembled(prefixed(tiny))
    cache = StaticCache(config=whole.config, max_cache_len=64)
    same(whole(windows[:1], cache=cache, use_cache=True).logits, whole(windows[:1]).logits)


def test_gradients_reach_the_tokens_through_the_prefixed_attention(tiny, windows):
    model = prefixed(tiny)
    with torch.enable_grad():
        hidden = model.embed(windows).requires_grad_()
        model.forward(model.load_layer(0), 0, hidden).square().sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().sum() > 0


def test_without_its_prefix_a_model_is_the_original(tiny, windows, logits_of):
    expected = logits_of(tiny, layers_of(tiny), windows)
    model = prefixed(tiny)
    bare = model.without_prefix()
    assert bare.prefix is None
    assert tiny.without_prefix() is tiny
    same(logits_of(bare, layers_of(bare), windows), expected)
    layer, hidden = model.load_layer(0), bare.embed(windows)
    with detached(layer):
        assert attached(layer) is None
        same(bare.forward(layer, 0, hidden), bare.forward(bare.load_layer(0), 0, hidden))
    assert attached(layer) is not None


def test_the_prefix_uses_up_positions(tiny):
    model = prefixed(tiny)
    assert (tiny.max_tokens, model.max_tokens) == (2048, 2045)
    assert assembled(model).config.max_position_embeddings == 2045
    assert model.config.max_position_embeddings == tiny.config.max_position_embeddings == 2048, (
        "as checkpoints store it"
    )
    assert assembled(tiny).config.max_position_embeddings == 2048


@pytest.mark.parametrize("architecture", ["llama"])
def test_padded_batches_are_numbered_once(tiny):
    decoder = tiny.shell.model
    before = len(decoder._forward_pre_hooks)
    for _ in range(2):
        number_padded_batches(decoder)
    assert len(decoder._forward_pre_hooks) == before + 1
