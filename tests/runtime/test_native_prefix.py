"""Native layers begin with the prefix: as the layers' own attention does, and with the same bits on every path."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from haq_lab.calibration.prefix_states import compute_prefix
from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.models.families.lookup import family_of
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.deploy import deploy
from haq_lab.runtime.kv_cache import KVCache
from haq_lab.runtime.native_decoder import MoeStack, NativeStack

if not library.available():
    pytest.skip(f"no CPU kernels here: {library.unavailable_reason()}", allow_module_level=True)

NATIVE = ("llama", "mixtral", "qwen3_moe", "olmoe")
SHORT, LONG = (7, 9), tuple(range(1, 41))  # less and more than one panel of 32 keys
LENGTHS = (20, 1, 33)


def pair(architecture, tokens):
    """The same quantised layers behind a prefix, as modules and deployed."""
    model = LayeredModel(TinyModel(architecture).folder())
    model = model.with_prefix(compute_prefix(model, tokens, ""))
    wholes = []
    for _ in range(2):
        layers: list[torch.nn.Module] = []
        inputs = PassInputs(model, RTN(), CpuBackend(), None, CalibrationPolicy(), {})
        sequential_pass(inputs, lambda index, layer, layers=layers: layers.append(layer))
        wholes.append(model.assemble(layers))
    deploy(wholes[1], model, CpuBackend())
    (stack,) = wholes[1].get_submodule(model.family.layers)
    assert isinstance(stack, NativeStack)
    for whole in wholes:
        whole.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, do_sample=False)
    return wholes


@pytest.fixture(scope="module")
def deployed(cache):
    built = {}

    def get(architecture, tokens=SHORT):
        if (architecture, tokens) not in built:
            built[architecture, tokens] = pair(architecture, tokens)
        return built[architecture, tokens]

    return get


def close(got, expected):
    """Rounding to a neighbouring level is rare and small; another prefix changes far more."""
    assert (got - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("tokens", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("architecture", NATIVE)
def test_native_layers_equal_the_modules(deployed, architecture, tokens, windows):
    plain, native = deployed(architecture, tokens)
    with torch.no_grad():
        close(native(windows[:1]).logits, plain(windows[:1]).logits)
        close(native(windows).logits, plain(windows).logits)


@pytest.mark.parametrize("architecture", NATIVE)
def test_the_same_bits_on_each_path(deployed, architecture, windows):
    _, native = deployed(architecture)
    row = windows[:1]
    alone = native.base_model(row).last_hidden_state
    assert torch.equal(native.base_model(row, use_cache=True).last_hidden_state, alone), "with a cache"
    assert torch.equal(native.base_model(windows).last_hidden_state[:1], alone), "in a batch"
    first = native.base_model(row[:, :30], use_cache=True)
    parts = [first.last_hidden_state]
    for place in range(30, row.shape[1]):
        parts.append(native.base_model(row[:, place : place + 1], cache=first.cache, use_cache=True).last_hidden_state)
    assert torch.equal(torch.cat(parts, dim=1), alone), "token by token"
    assert first.cache.get_seq_length() == row.shape[1], "transformers does not count the prefix"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", NATIVE)
def test_a_padded_batch_has_the_bits_of_single_sequences(deployed, architecture, side, windows):
    _, native = deployed(architecture)
    width = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    places = [slice(width - n, width) if side == "left" else slice(0, n) for n in LENGTHS]
    for number, (place, length) in enumerate(zip(places, LENGTHS, strict=True)):
        ids[number, place], mask[number, place] = windows[number, :length], 1
    states = native.base_model(ids, attention_mask=mask).last_hidden_state
    for number, (place, length) in enumerate(zip(places, LENGTHS, strict=True)):
        alone = native.base_model(windows[number : number + 1, :length]).last_hidden_state[0]
        assert torch.equal(states[number, place], alone)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(deployed, settings, windows):
    plain, native = deployed("llama")
    prompt = windows[:2, :12]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, **settings}
    assert torch.equal(native.generate(prompt, **arguments), plain.generate(prompt, **arguments))


def test_a_cropped_cache_continues(deployed, windows):
    _, native = deployed("llama")
    row = windows[:1]
    once = native.base_model(row, use_cache=True)
    once.cache.crop(-8)
    assert once.cache.get_seq_length() == row.shape[1] - 8
    again = native.base_model(row[:, -8:], cache=once.cache, use_cache=True).last_hidden_state
    assert torch.equal(again, native.base_model(row).last_hidden_state[:, -8:])


def test_a_cache_goes_on_in_the_modules_without_the_prefix(deployed, windows):
    plain, native = deployed("llama")
    cache = native(windows[:, :30], use_cache=True).cache
    kv = cache.layers[0]
    assert isinstance(kv, KVCache)
    cache.layers = kv.to_dynamic_layers()
    assert [layer.get_seq_length() for layer in cache.layers] == [30, 30]
    assert all(type(layer) is DynamicLayer for layer in cache.layers)
    expected = native(windows).logits[:, 30:]
    close(plain(windows[:, 30:], cache=cache, use_cache=True).logits, expected)


@pytest.mark.parametrize("architecture", ["mixtral"])
def test_experts_as_modules(architecture, windows):
    plain, native = pair(architecture, SHORT)
    (stack,) = native.get_submodule("model.layers")
    halves = MoeStack(list(stack.layers), list(stack._parts), 0, family_of(native.config).moe)
    native.set_submodule("model.layers", torch.nn.ModuleList([halves]))
    close(native(windows).logits, plain(windows).logits)
