"""The official OpenAI client against a server: same text as `generate`, queues, disconnections, mistakes."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

openai = pytest.importorskip("openai", reason="the extra `serve` is not installed")

PROMPT, TOKENS = "The quick brown fox", 12
MESSAGE = [{"role": "user", "content": PROMPT}]


def metrics(served) -> dict[str, float]:
    """Return the values of `/metrics` by name and labels, such as `haq_lab_requests_total finished`.

    A request is counted a moment after its answer, so this waits until none is left.
    """
    for _ in range(500):
        families = text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        values = {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}
        if values["haq_lab_requests_queued"] == 0:
            return values
        time.sleep(0.01)
    raise AssertionError("a request has not ended")


def streamed_chat(served, content: str, tokens: int = TOKENS, **settings) -> tuple[str, list[str | None]]:
    """Return a streamed answer, and the reasons why it ended."""
    message = [{"role": "user", "content": content}]
    with served.client() as client:
        stream = client.chat.completions.create(
            model="tiny", messages=message, max_tokens=tokens, stream=True, **settings
        )
        choices = [chunk.choices[0] for chunk in stream]
    return "".join(choice.delta.content or "" for choice in choices), [choice.finish_reason for choice in choices]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_answers_equal_those_of_generate(kind, request):
    served = request.getfixturevalue(kind)
    expected = served.chatted(PROMPT, TOKENS)
    text, reasons = streamed_chat(served, PROMPT)
    assert (text, reasons[-1], set(reasons[:-1])) == (expected, "length", {None})
    with served.client() as client:
        whole = client.chat.completions.create(model="tiny", messages=MESSAGE, max_tokens=TOKENS)
        assert whole.choices[0].message.content == expected
        assert whole.usage.completion_tokens == TOKENS
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=TOKENS, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == served.generated(PROMPT, TOKENS)
        plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=TOKENS)
        assert plain.choices[0].text == served.generated(PROMPT, TOKENS)
        assert plain.usage.prompt_tokens == len(PROMPT)


def stopped(served, stop: str | list[str], stream: bool) -> tuple[str, str]:
    """Return a chat's answer and a continued text with stop strings."""
    if stream:
        chat = streamed_chat(served, PROMPT, stop=stop)[0]
    with served.client() as client:
        settings = {"model": "tiny", "max_tokens": TOKENS, "stop": stop}
        if not stream:
            chat = client.chat.completions.create(messages=MESSAGE, **settings).choices[0].message.content
            return chat, client.completions.create(prompt=PROMPT, **settings).choices[0].text
        chunks = client.completions.create(prompt=PROMPT, stream=True, **settings)
        return chat, "".join(chunk.choices[0].text for chunk in chunks)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_before_the_text_that_stops_it(dense, stream):
    chat, text = dense.chatted(PROMPT, TOKENS), dense.generated(PROMPT, TOKENS)
    assert stopped(dense, [chat[4:7], "never"], stream)[0] == chat[: chat.find(chat[4:7])]
    assert stopped(dense, text[4:7], stream)[1] == text[: text.find(text[4:7])]
    assert stopped(dense, chat[-2:] + "never", stream)[0] == chat, "its beginning was held back until the end"
    assert stopped(dense, text[-2:] + "never", stream)[1] == text


def test_a_temperature_samples_and_a_seed_repeats(dense):
    settings = {"temperature": 1.5, "seed": 7}
    torch.manual_seed(7)
    expected = dense.generated(PROMPT, TOKENS, do_sample=True, temperature=1.5)
    with dense.client() as client:

        def answer(_: int) -> str:
            return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=TOKENS, **settings).choices[0].text

        with ThreadPoolExecutor(3) as pool:
            assert set(pool.map(answer, range(3))) == {expected}
    assert expected != dense.generated(PROMPT, TOKENS)


def test_four_clients_at_once(sparse):
    texts = ["one", "two two", "three three three", "four four four four"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda text: streamed_chat(sparse, text)[0], texts))
    assert answers == [sparse.chatted(text, TOKENS) for text in texts]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_stops_its_request(dense, stream):
    before = metrics(dense)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1900, "stream": stream}
    request = {"method": "POST", "url": f"{dense.url}/v1/completions", "json": body}
    if stream:
        with httpx.stream(**request) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.request(**request, timeout=0.2)
    assert streamed_chat(dense, PROMPT)[0] == dense.chatted(PROMPT, TOKENS), "the next one is answered"
    after = metrics(dense)
    assert after["haq_lab_requests_total cancelled"] == before["haq_lab_requests_total cancelled"] + 1
    assert after["haq_lab_generated_tokens_total"] - before["haq_lab_generated_tokens_total"] < 1900


def test_a_client_that_leaves_the_queue_is_not_computed(dense):
    """Two requests wait behind a long one. One of them disconnects."""
    before = metrics(dense)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 800}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{dense.url}/v1/completions", json=body, timeout=60)
        time.sleep(0.1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{dense.url}/v1/completions", json=body, timeout=0.1)
        assert first.result().json()["usage"]["completion_tokens"] == 800
    assert streamed_chat(dense, PROMPT)[0] == dense.chatted(PROMPT, TOKENS)
    tokens = metrics(dense)["haq_lab_generated_tokens_total"] - before["haq_lab_generated_tokens_total"]
    assert tokens == 800 + TOKENS


def test_a_prompt_longer_than_the_context_is_refused(dense):
    with dense.client() as client, pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt="x" * 2048, stream=True)
    assert "2048 tokens, but the model's context has 2048" in raised.value.message
    assert raised.value.body["type"] == "invalid_request_error"


def test_an_answer_ends_with_the_context(dense):
    with dense.client() as client:
        answer = client.completions.create(model="tiny", prompt="x" * 2040, max_tokens=100)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")


@pytest.mark.parametrize(
    ("endpoint", "body", "message"),
    [
        ("completions", {"prompt": ""}, "The prompt is empty"),
        ("completions", {}, "prompt: Field required"),
        ("completions", {"prompt": ["a", "b"]}, "prompt: Input should be a valid string"),
        ("completions", {"prompt": "a", "model": "gpt-4"}, "'gpt-4'"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens: .*greater than or equal to 1"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "temperature: .*valid number"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature: .*greater than or equal to 0"),
        ("completions", {"prompt": "a", "n": 2}, "n: Input should be 1"),
        ("completions", {"prompt": "a", "logprobs": 3}, "logprobs: "),
        ("completions", {"prompt": "a", "seed": -1}, "seed: "),
        ("completions", {"prompt": "a", "stop": ["b", ""]}, "stop.*: String should have at least 1 character"),
        ("completions", {"prompt": "a", "generation_config": "{"}, "generation_config: Invalid JSON"),
        ("completions", {"prompt": "a", "generation_config": '{"max_new_tokens": -1}'}, "max_new_tokens"),
        ("completions", {"prompt": "a", "tempreature": 1}, "tempreature"),
        ("chat/completions", {"messages": []}, "messages: "),
        ("chat/completions", {"messages": [{"content": "a"}]}, "messages.0.role: Field required"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, "robots may not talk"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]},
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ("chat/completions", ["no", "object"], "not a JSON object"),
    ],
)
def test_a_mistake_is_one_message(dense, endpoint, body, message):
    answer = httpx.post(f"{dense.url}/v1/{endpoint}", json=body)
    assert answer.status_code in (400, 422)
    text = answer.json()["error"]["message"]
    assert "\n" not in text
    assert re.search(message, text)
    assert httpx.get(f"{dense.url}/health").json() == {"status": "ok"}


def test_a_model_without_a_chat_template_says_so(dense, monkeypatch):
    monkeypatch.setattr(dense.tokenizer, "chat_template", None)
    with dense.client() as client, pytest.raises(openai.BadRequestError, match="chat_template is not set"):
        client.chat.completions.create(model="tiny", messages=MESSAGE)


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_while_generating_reaches_the_client(dense, monkeypatch, stream):
    def fail(**arguments):
        raise OSError('the disk has a "hole"\nin it')

    monkeypatch.setattr(dense.model, "generate", fail)
    with dense.client() as client, pytest.raises(openai.APIError):
        list(client.completions.create(model="tiny", prompt=PROMPT, stream=stream))


def test_only_the_models_own_endpoints_exist(dense):
    with dense.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
    for path in ("/reset", "/load_model", "/v1/systemone", "/docs"):
        assert httpx.post(f"{dense.url}{path}", json={"model": "other"}).status_code == 404


def test_metrics_count_requests_and_tokens(dense):
    before = metrics(dense)
    streamed_chat(dense, PROMPT)
    httpx.post(f"{dense.url}/v1/completions", json={"prompt": ""})
    after = metrics(dense)
    change = {name: after[name] - before[name] for name in after}
    assert change["haq_lab_requests_total finished"] == 1
    assert change["haq_lab_requests_total refused"] == 1
    assert change["haq_lab_generated_tokens_total"] == TOKENS
    assert change["haq_lab_prompt_tokens_total"] == len(f"user: {PROMPT}\nassistant:")
    assert change["haq_lab_first_token_seconds_count"] == 1
    assert change["haq_lab_generation_seconds_total"] > 0
    assert not any("offload" in name for name in after)
