"""Answers are those of transformers' `generate`, with and without a KV cache from the last answer."""

from __future__ import annotations

import pytest
import torch

import haq_lab
from haq_lab.generate.conversation import Conversation
from haq_lab.generate.generator import Answer, Generator
from haq_lab.utils.errors import UserError


@pytest.fixture
def generator(chat_model) -> Generator:
    return Generator(*haq_lab.load(chat_model, "reference"), temperature=0, max_tokens=12)


def _expected(generator: Generator, prompt: list[int], **settings: object) -> str:
    """Return the text of transformers' own `generate`."""
    ids = torch.tensor([prompt])
    tokens = generator.model.generate(ids, max_new_tokens=generator.max_tokens, pad_token_id=0, **settings)
    return generator.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)


def _prompt(generator: Generator, text: str) -> list[int]:
    return generator.tokenizer(text).input_ids


def test_greedy_text_is_that_of_generate(generator):
    prompt, pieces = _prompt(generator, "The quick brown fox"), []
    answer = generator.generate(prompt, pieces.append)
    assert answer.text == "".join(pieces) == _expected(generator, prompt, do_sample=False)
    assert answer.tokens == 12
    assert answer.cut
    assert not answer.stopped


@pytest.mark.parametrize("temperature", [None, 1.7])
def test_a_seed_repeats_a_sampled_text(generator, temperature):
    generator.temperature = temperature
    prompt = _prompt(generator, "The quick brown fox")
    torch.manual_seed(3)
    text = generator.generate(prompt, lambda _: None).text
    torch.manual_seed(3)
    settings = {} if temperature is None else {"do_sample": True, "temperature": temperature}
    assert text == _expected(generator, prompt, **settings)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_kv_cache_of_the_last_answer_is_reused(chat_model, backend, monkeypatch):
    generator = Generator(*haq_lab.load(chat_model, backend), temperature=0, max_tokens=6)
    first = _prompt(generator, "The quick brown fox")
    generator.generate(first, lambda _: None)
    lengths: list[int] = []
    generator.model.register_forward_pre_hook(
        lambda _, arguments, keywords: lengths.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    second = [*generator._cached, *_prompt(generator, " jumps")]
    text = generator.generate(second, lambda _: None).text
    assert lengths == [len(" jumps"), 1, 1, 1, 1, 1]
    assert text == _expected(generator, second, do_sample=False)
    other = _prompt(generator, "Another prompt")
    assert generator.generate(other, lambda _: None).text == _expected(generator, other, do_sample=False)


def test_a_failed_answer_leaves_no_cache(generator, monkeypatch):
    prompt = _prompt(generator, "The quick brown fox")
    generator.generate(prompt, lambda _: None)

    def fail(text: str) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        generator.generate([*generator._cached, 70], fail)
    assert generator._cache is None
    assert generator.generate(prompt, lambda _: None).text == _expected(generator, prompt, do_sample=False)


def test_a_chat_gives_the_template_all_messages(generator):
    conversation = Conversation(generator, system="Be brief.")
    first = conversation.ask("Hello", lambda _: None)
    second = conversation.ask("Again", lambda _: None)
    written = f"<system>Be brief.\n<user>Hello\n<assistant>{first.text}\n<user>Again\n<assistant>"
    assert second.text == _expected(generator, _prompt(generator, written), do_sample=False)
    conversation.reset()
    assert conversation.ask("Hello", lambda _: None).text == first.text


def test_a_stopped_answer_is_part_of_the_chat(generator):
    conversation = Conversation(generator)
    steps: list[None] = []

    def stop_at_the_third_token(*_: object) -> None:
        steps.append(None)
        generator.stop.requested = len(steps) == 3

    generator.model.register_forward_hook(stop_at_the_third_token)
    answer = conversation.ask("Hello", lambda _: None)
    assert (answer.tokens, answer.stopped, answer.cut) == (3, True, False)
    assert conversation._messages[-1] == {"role": "assistant", "content": answer.text}


def test_a_prompt_may_fill_the_context_but_for_one_token(generator):
    assert generator.generate([65] * 2047, lambda _: None).tokens == 1
    with pytest.raises(UserError, match=r"prompt: 2048 tokens do not fit into the model's context of 2048 tokens"):
        generator.generate([65] * 2048, lambda _: None)


def test_a_refused_prompt_leaves_the_chat_unchanged(generator):
    conversation = Conversation(generator)
    for prompt, message in (("x" * 3000, "do not fit"), (" \n", "it is empty")):
        with pytest.raises(UserError, match=message):
            conversation.ask(prompt, lambda _: None)
    assert conversation._messages == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system message') }}", "TemplateError: no system message"),
        ("{% for message in %}", "TemplateSyntaxError"),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{# nothing #}", "prompt: it is empty"),
    ],
)
def test_a_wrong_chat_template_is_one_message(generator, template, message):
    generator.tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        Conversation(generator).ask("Hello", lambda _: None)
    assert "\n" not in str(error.value)


def test_the_summary_names_speed_and_traffic():
    answer = Answer("", tokens=11, first_token_s=0.25, decode_s=0.5, stopped=False, cut=False)
    assert answer.summary() == "11 tokens, 20.0 tokens/s, first token after 0.25 s"
    answer = Answer("", 1, 0.25, 0.0, stopped=True, cut=False, hits=3, misses=1, bytes_moved=2_500_000)
    assert answer.summary() == "1 token, first token after 0.25 s, hit rate 75.0%, 2.5 MB moved, stopped"
