"""Serve a tiny model in a thread of this process, with a chat template and answers in ASCII."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import uvicorn

import haq_lab
from haq_lab.serve.app import build_app
from haq_lab.serve.server import address_of, open_socket

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'robot' %}{{ raise_exception('robots may not talk') }}"
    "{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)


class Served:
    """A running server.

    Attributes:
        url: Its address, without `/v1`.
    """

    def __init__(self, model: Any, tokenizer: Any, url: str):
        self.model, self.tokenizer, self.url = model, tokenizer, url

    def client(self, **settings: Any) -> openai.OpenAI:
        """Return a client of the official library that does not repeat failed requests."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **settings)

    def generated(self, text: str, tokens: int, **settings: Any) -> str:
        """Return what `generate` answers to a text."""
        prompt = self.tokenizer(text, return_tensors="pt")
        answer = self.model.generate(**prompt, max_new_tokens=tokens, **settings)[0, prompt["input_ids"].shape[1] :]
        return self.tokenizer.decode(answer, skip_special_tokens=True)

    def chatted(self, content: str, tokens: int) -> str:
        """Return what `generate` answers to a message."""
        message = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return self.generated(text, tokens)


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Served]:
    """Serve a checkpoint within the block."""
    model, tokenizer = haq_lab.load(folder, "reference", **settings)
    tokenizer.chat_template = TEMPLATE
    printable = {index for text, index in tokenizer.get_vocab().items() if text.isascii() and text.isprintable()}
    model.generation_config.suppress_tokens = sorted({*range(257)} - printable)  # a random model writes broken UTF-8
    app, _ = build_app("tiny", model, tokenizer)
    with open_socket("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Served(model, tokenizer, address_of(listener))
        finally:
            server.should_exit = True
            thread.join()
