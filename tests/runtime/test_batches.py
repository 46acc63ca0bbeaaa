"""A sequence has the same bits alone and in a batch, whatever its padding."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.deploy import deploy
from haq_lab.runtime.layer_parts import LayerParts, MoeParts
from haq_lab.runtime.native_decoder import MoeStack, NativeStack, make_stack
from haq_lab.utils.errors import UserError

if not library.available():
    pytest.skip(f"no CPU kernels here: {library.unavailable_reason()}", allow_module_level=True)

NATIVE = ("llama", "mixtral", "qwen3_moe", "olmoe")
LENGTHS = (40, 1, 33, 12)
WIDTH = max(LENGTHS)
sides = pytest.mark.parametrize("side", ["left", "right"])


def make(architecture, backend=None, hidden=64):
    model = LayeredModel(TinyModel(architecture, hidden=hidden).folder())
    backend = backend or CpuBackend()
    layers: list[torch.nn.Module] = []
    sequential_pass(
        PassInputs(model, RTN(), backend, None, CalibrationPolicy(), {}), lambda index, layer: layers.append(layer)
    )
    whole = deploy(model.assemble(layers), model, backend)
    whole.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, do_sample=False)
    return model, whole, layers


@pytest.fixture(scope="module")
def models(cache):
    built = {}

    def get(architecture):
        if architecture not in built:
            built[architecture] = make(architecture)[1]
        return built[architecture]

    return get


def padded(sequences, side):
    """The token ids and the attention mask of a padded batch."""
    ids, mask = torch.zeros(len(sequences), WIDTH, dtype=torch.long), torch.zeros(len(sequences), WIDTH).long()
    for row, sequence in enumerate(sequences):
        place = slice(WIDTH - len(sequence), WIDTH) if side == "left" else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 257, (length,), generator=generator) for length in LENGTHS]


def reasons(caplog):
    """The warnings about calls that were not native."""
    records = [record for record in caplog.records if record.name.startswith("haq_lab")]
    assert all(record.levelno == logging.WARNING for record in records)
    return [record.getMessage() for record in records]


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def steps(whole, ids, mask, count):
    """The logits of a prompt at its tokens, and of tokens after it, for each sequence."""
    out = whole(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True)
    logits = [[row[tokens.bool()]] for row, tokens in zip(out.logits, mask, strict=True)]
    for step in range(count):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
        given = torch.full((len(mask), 1), 7 + step)
        position_ids = positions_of(mask)[:, -1:]
        out = whole(given, attention_mask=mask, position_ids=position_ids, cache=out.cache, use_cache=True)
        for row, sequence in enumerate(logits):
            sequence.append(out.logits[row])
    return [torch.cat(sequence) for sequence in logits]


@sides
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("architecture", NATIVE)
def test_bits_alone_and_in_a_batch(models, architecture, side, threads, caplog):
    torch.set_num_threads(threads)
    whole = models(architecture)
    together = steps(whole, *padded(prompts(), side), 3)
    for sequence, got in zip(prompts(), together, strict=True):
        (alone,) = steps(whole, sequence[None], torch.ones(1, len(sequence), dtype=torch.long), 3)
        assert torch.equal(got, alone)
    assert not reasons(caplog), "all calls were native"


@sides
@pytest.mark.parametrize("architecture", [*NATIVE, "opt"])
def test_logits_of_the_reference_backend_are_close(architecture, side):
    """Its attention is torch's, which adds in another order if there is padding."""
    _, whole, _ = make(architecture, ReferenceBackend())
    together = steps(whole, *padded(prompts(), side), 2)
    for sequence, got in zip(prompts(), together, strict=True):
        (alone,) = steps(whole, sequence[None], torch.ones(1, len(sequence), dtype=torch.long), 2)
        error = (got - alone).norm(dim=-1) / alone.norm(dim=-1)
        assert error.median() < 0.02


@pytest.mark.parametrize("architecture", NATIVE)
def test_a_batch_is_close_to_the_original_layers(models, architecture):
    """The mask and the positions are read as transformers reads them."""
    _, plain, _ = make(architecture, ReferenceBackend())
    ids, mask = padded(prompts(), "left")
    for got, wanted in zip(steps(models(architecture), ids, mask, 2), steps(plain, ids, mask, 2), strict=True):
        assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.02


def test_many_tokens_and_several_parts(models):
    """More tokens than the kernels take at a time, so that sequences are cut; then chunks of several tokens."""
    whole = models("llama")
    ids = torch.randint(1, 257, (3, 400), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 400, dtype=torch.long)
    mask[1, :130] = 0
    out = whole(ids[:, :390], attention_mask=mask[:, :390], position_ids=positions_of(mask)[:, :390], use_cache=True)
    rest = whole(ids[:, 390:], attention_mask=mask, position_ids=positions_of(mask)[:, 390:], cache=out.cache)
    got = torch.cat([out.logits, rest.logits], 1)
    for row, first in enumerate((0, 130, 0)):
        assert torch.equal(got[row, first:], whole(ids[row : row + 1, first:], use_cache=False).logits[0])


def test_left_padding_generates_what_single_prompts_generate(models):
    for architecture in NATIVE:
        whole = models(architecture)
        ids, mask = padded(prompts(), "left")
        together = whole.generate(ids, attention_mask=mask, max_new_tokens=6)
        for row, sequence in enumerate(prompts()):
            ones = torch.ones(1, len(sequence), dtype=torch.long)
            alone = whole.generate(sequence[None], attention_mask=ones, max_new_tokens=6)
            assert torch.equal(together[row, WIDTH:], alone[0, len(sequence) :])


def test_loglikelihoods_of_right_padded_batches(models):
    """As lm-evaluation-harness computes them: right padding, no attention mask, no cache."""
    whole = models("llama")
    ids, _ = padded(prompts(), "right")
    together = whole(ids).logits.log_softmax(-1)
    for row, sequence in enumerate(prompts()):
        alone = whole(sequence[None]).logits.log_softmax(-1)
        assert torch.equal(together[row, : len(sequence)], alone[0])


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beam_search_reorders_the_cache(models, settings, caplog):
    whole = models("llama")
    sequences = [prompts()[index] for index in (2, 3)]
    ids, mask = padded(sequences, "left")
    together = whole.generate(ids, attention_mask=mask, max_new_tokens=6, **settings)
    count = settings.get("num_return_sequences", 1)
    for row, sequence in enumerate(sequences):
        ones = torch.ones(1, len(sequence), dtype=torch.long)
        alone = whole.generate(sequence[None], attention_mask=ones, max_new_tokens=6, **settings)
        assert torch.equal(together[row * count : (row + 1) * count, WIDTH:], alone[:, len(sequence) :])
    assert not reasons(caplog)


def test_assisted_decoding_crops_the_cache(models, caplog):
    whole, prompt = models("llama"), prompts()[0][None]
    ones = torch.ones_like(prompt)
    wanted = whole.generate(prompt, attention_mask=ones, max_new_tokens=12)
    _, assistant, _ = make("llama", hidden=128)
    got = whole.generate(prompt, attention_mask=ones, max_new_tokens=12, assistant_model=assistant)
    assert torch.equal(got, wanted)
    got = whole.generate(prompt, attention_mask=ones, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(got, wanted)
    assert not reasons(caplog)


def test_the_cache_crops_repeats_selects_and_resets(models):
    whole = models("llama")
    ids, mask = padded(prompts(), "left")
    out = whole(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True)
    cropped, repeated = copy.deepcopy(out.cache), copy.deepcopy(out.cache)
    cropped.crop(-3)
    assert cropped.get_seq_length() == WIDTH - 3
    again = whole(
        ids[:, -3:], attention_mask=mask, position_ids=positions_of(mask)[:, -3:], cache=cropped, use_cache=True
    )
    assert torch.equal(again.logits[0], out.logits[0, -3:])
    repeated.batch_repeat_interleave(2)
    repeated.batch_select_indices(torch.tensor([7, 0]))
    chosen = torch.tensor([3, 0])
    longer = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
    given, position = torch.full((4, 1), 9), positions_of(longer)[:, -1:]
    wanted = whole(given, attention_mask=longer, position_ids=position, cache=out.cache).logits
    selected = {"attention_mask": longer[chosen], "position_ids": position[chosen]}
    assert torch.equal(whole(given[:2], cache=repeated, **selected).logits, wanted[chosen])
    repeated.reset()
    assert repeated.get_seq_length() == 0
    fresh = whole(ids[:1], cache=repeated, use_cache=True).logits
    assert torch.equal(fresh, whole(ids[:1], use_cache=False).logits)


def test_other_masks_run_through_the_original_layers(caplog):
    """The cache is converted, with padding at its place, and the log says why once."""
    _, plain, _ = make("llama", ReferenceBackend())
    _, whole, _ = make("llama")
    ids, mask = padded(prompts(), "left")
    given, position = torch.full((4, 1), 9), positions_of(mask)[:, -1:] + 1
    longer = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
    longer[0, :4] = 0  # tokens that the first call has shown
    logits = []
    for model in (plain, whole):
        out = model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True)
        for _ in range(2):
            step = model(given, attention_mask=longer, position_ids=position, cache=copy.deepcopy(out.cache))
        logits.append(step.logits)
    assert ((logits[1] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)).median() < 0.02
    assert reasons(caplog) == [
        "native decoder not used for this call: the attention mask hides tokens that an earlier call has shown"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda given: given | {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool)}, "is not causal"),
        (lambda given: given | {"attention_mask": torch.zeros(2, 1, 5, 5)}, "is not causal"),
        (lambda given: given | {"cache": "static"}, "is not a DynamicCache"),
    ],
)
def test_calls_that_are_not_native_are_logged(change, reason, caplog):
    _, whole, _ = make("llama")
    given = change({"input_ids": torch.arange(10).reshape(2, 5)})
    if given.get("cache") == "static":
        given["cache"] = StaticCache(whole.config, max_cache_len=8)
    whole(**given)
    (message,) = reasons(caplog)
    assert reason in message


def test_padding_that_is_shown_later_is_refused(models):
    whole = models("llama")
    ids, mask = padded(prompts(), "left")
    cache = whole(ids, attention_mask=mask, use_cache=True).cache
    with pytest.raises(UserError, match="position 0 of sequence 1 was padding in an earlier call"):
        whole(ids[:, :1], cache=cache)
    with pytest.raises(UserError, match="position 0 of sequence 1 was padding in an earlier call"):
        whole(ids[:, :2], cache=cache, attention_mask=torch.ones(4, WIDTH + 2, dtype=torch.long))


def test_a_sequence_of_padding_only(models):
    whole = models("llama")
    ids, mask = padded(prompts(), "right")
    mask[1] = 0
    got = whole(ids, attention_mask=mask, use_cache=True, cache=DynamicCache())
    assert got.logits.isfinite().all()
    assert torch.equal(got.logits[0], whole(ids[:1]).logits[0])
    mask[:] = 0
    assert whole(ids, attention_mask=mask, use_cache=True).cache.get_seq_length() == WIDTH


def test_experts_as_modules_see_tokens_only():
    model, whole, layers = make("mixtral")
    (stack,) = whole.get_submodule(model.family.layers)
    assert type(stack) is NativeStack
    parts = [LayerParts.of(layer, model.groups_of(0), model.family) for layer in layers]
    for part in parts:
        part.moe = MoeParts()
    halves = make_stack(layers, parts, 0, model.family.moe)
    assert type(halves) is MoeStack
    tokens = padded(prompts(), "left")[1].bool()
    hidden, angles = torch.randn(4, WIDTH, model.config.hidden_size), torch.randn(1, WIDTH, stack.head_dim)
    given = hidden, angles.cos(), angles.sin()
    rows = []
    handle = layers[0].mlp.experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    got = halves.step(*given, halves.new_cache(), tokens)
    handle.remove()
    assert rows == [sum(LENGTHS)]
    assert torch.equal(got, stack.step(*given, stack.new_cache(), tokens))
