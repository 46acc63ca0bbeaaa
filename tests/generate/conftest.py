"""A tiny chat model as a checkpoint, and the command in this process."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import Outcome
from transformers import AutoTokenizer

import haq_lab
from haq_lab.cli.generate import main
from haq_lab.models.sources import TinyModel

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """A checkpoint of a tiny Llama with a chat template. Its generation config samples."""
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [0]}
    return _chat_model(tmp_path_factory.mktemp("chat"), sampling)


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory) -> Path:
    """The same model, but it writes empty lines and never ends an answer. Its context is long."""
    source = TinyModel("llama").folder()
    (newline,) = AutoTokenizer.from_pretrained(source)("\n", add_special_tokens=False).input_ids
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    others = [token for token in range(vocabulary) if token != newline]
    return _chat_model(tmp_path_factory.mktemp("endless"), {"suppress_tokens": others}, max_position_embeddings=2**15)


def _chat_model(folder: Path, generation: dict[str, object], **config: object) -> Path:
    source = Path(shutil.copytree(TinyModel("llama").folder(), folder / "model"))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "generation_config.json").write_text(json.dumps(generation))
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return haq_lab.quantize(source, "rtn", out=folder / "checkpoint")


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory) -> Path:
    """A checkpoint of a tiny Mixtral without a chat template."""
    return haq_lab.quantize("tiny_mixtral", "rtn", out=tmp_path_factory.mktemp("plain") / "checkpoint")


class Stream(io.StringIO):
    """A standard input that is a pipe or a terminal."""

    def __init__(self, text: str, terminal: bool):
        super().__init__(text)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def command(capsys, monkeypatch) -> Command:
    """Run the command on the reference backend. `stdin` is piped; None is a terminal."""

    def run(*arguments: object, stdin: str | None = None) -> Outcome:
        monkeypatch.setattr(sys, "stdin", Stream(stdin or "", terminal=stdin is None))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["--backend=reference", *map(str, arguments)])
        printed = capsys.readouterr()
        return Outcome(int(end.value.code or 0), printed.out, printed.err)

    return run
