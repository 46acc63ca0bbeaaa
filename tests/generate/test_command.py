"""`python -m haq_lab.generate`: one answer, settings, and mistakes in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import haq_lab

PROMPT = "The quick brown fox"
SHORT = ["--max-tokens=5", "--temperature=0"]


def _greedy(folder: Path, text: str) -> str:
    model, tokenizer = haq_lab.load(folder, "reference")
    prompt = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_prompt_is_a_message_of_a_chat(command, chat_model):
    code, out, err = command(chat_model, PROMPT, *SHORT, "--system=Be brief.")
    assert code == 0
    assert out == _greedy(chat_model, f"<system>Be brief.\n<user>{PROMPT}\n<assistant>") + "\n"
    assert len(err.splitlines()) == 1
    assert err.startswith("5 tokens, ")


@pytest.mark.parametrize("words", [[PROMPT], ["-"], []])
def test_without_a_template_the_prompt_is_continued(command, plain_model, words):
    code, out, err = command(plain_model, *words, *SHORT, stdin="" if PROMPT in words else PROMPT)
    assert code == 0
    assert out == _greedy(plain_model, PROMPT) + "\n"
    assert err.startswith("The model has no chat template, so it continues each prompt as plain text.\n5 tokens")


def test_offloading_changes_no_text_and_reports_its_traffic(command, plain_model):
    expected = command(plain_model, PROMPT, *SHORT).out
    code, out, err = command(plain_model, "offload=lru", PROMPT, "offload.budget=50%", *SHORT, "offload.spare=2")
    assert (code, out) == (0, expected)
    assert "hit rate " in err
    assert " MB moved" in err


def test_a_seed_repeats_an_answer(command, chat_model):
    first, again, other = (
        command(chat_model, PROMPT, "--max-tokens=8", "--temperature=2", f"--seed={seed}").out for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_model_option_is_quantised_once(command, cache, plain_model):
    code, out, err = command("tiny_mixtral", PROMPT, *SHORT)
    assert code == 0
    assert "tiny_mixtral is quantised by RTN, once: " in err
    assert out == command(plain_model, PROMPT, *SHORT).out
    assert "quantised" not in command("tiny_mixtral", PROMPT, *SHORT).err
    assert len(list((cache / "quantized").glob("tiny_mixtral-rtn-*/manifest.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PLAIN", ""], "prompt: it is empty"),
        (["PLAIN", " ", "--max-tokens=2"], "prompt: it is empty"),
        (["PLAIN", "x" * 2048], "prompt: 2048 tokens do not fit into the model's context of 2048 tokens"),
        (["PLAIN", "two", "words"], "'two' and 'words' are two prompts. Put the prompt in quotes."),
        (["PLAIN", "x", "--system=y"], "--system has no effect because the model has no chat template"),
        (["PLAIN", "x", "--backend=gpu"], "backend: 'gpu' is not one of"),
        *([] if torch.cuda.is_available() else [(["PLAIN", "x", "--backend=cuda"], "needs an NVIDIA GPU")]),
        (["PLAIN", "x", "offload=haqq"], "offload: 'haqq' is not one of .*'haq'"),
        (["PLAIN", "x", "offload=haq", "offload.budgt=40%"], r"offload\.budgt: .*did you mean 'budget'"),
        (["PLAIN", "x", "offload=haq", "offload.folder=y"], r"offload\.folder: there is no such setting"),
        (
            ["PLAIN", "x", "offload=haq", "offload.budget=40%,50%"],
            r"offload\.budget: '.*=40%,50%' gives several values",
        ),
        (["PLAIN", "x", "offload=haq", "offload.budget=[40%"], r"offload\.budget: .* cannot be parsed"),
        (["PLAIN", "x", "offload.budget=40%"], r"offload\.budget has no effect because offload=none"),
        (["CHAT", "x", "offload=haq"], "a 'llama' has no experts to offload"),
        (["CHAT", "x", "--temperature=-1"], "--temperature: -1.0 is not valid"),
        (["CHAT", "x", "--temperature=nan"], "--temperature: nan is not valid"),
        (["CHAT", "x", "--max-tokens=0"], "--max-tokens: 0 is too few"),
        (["CHAT", "x", "--seed=-1"], "--seed: -1 is not valid"),
        (["tiny_lama", "x"], "'tiny_lama' is not a folder, nor a model .*did you mean 'tiny_llama'"),
        (["hf", "x"], "'hf' is not a folder, nor a model"),
        (["EMPTY", "x"], "'.*' is not a haq_lab checkpoint because it has no manifest.json"),
        (["NEWER", "x"], "a newer version of haq_lab: its format is 99, and this version reads 2. Update haq_lab."),
    ],
)
def test_a_mistake_is_one_line(command, chat_model, plain_model, tmp_path, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    newer = Path(shutil.copytree(chat_model, tmp_path / "NEWER"))
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps(manifest | {"version": 99, "shards": "other"}))
    folders = {"PLAIN": plain_model, "CHAT": chat_model, "EMPTY": tmp_path / "EMPTY", "NEWER": newer}
    code, out, err = command(folders.get(arguments[0], arguments[0]), *arguments[1:])
    assert (code, out) == (2, "")
    *notes, last = err.splitlines()
    assert [note for note in notes if "no chat template" not in note] == []
    assert re.search(message, last), last


def test_an_empty_pipe_is_an_empty_prompt(command, chat_model):
    code, _, err = command(chat_model, stdin="")
    assert code == 2
    assert "prompt: it is empty" in err
