"""The commands of experiments/first_ten_minutes.md run as a new user types them, on tiny models and few tokens."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from documented import ROOT, blocks, commands, entry
from launching import launch

from haq_lab.cli.commands import COMMANDS
from haq_lab.models.sources import TinyModel

PAGE = ROOT / "experiments" / "first_ten_minutes.md"
SMALL = ["backend=reference", "calibration.samples=4", "calibration.seqlen=64", "tracking=none"]
LATENCY = [
    "measure.latency.seconds=0",
    "measure.latency.iterations=1",
    "measure.latency.prompt_tokens=8",
    "measure.latency.decode_tokens=4",
]
EXTRA = {
    "generate": ["--backend=reference", "--max-tokens=2"],
    "trace": ["--windows=2", "--seqlen=32"],
    "replay": ["--budgets", "0.5"],
    "plan": ["--tokens=2"],
}


def _run(words: list[str]) -> None:
    """Run a command in this process. It must end with exit code 0."""
    name, arguments = entry(words)
    if name == "run":
        arguments = ["model=tiny_llama" if word == "model=smol" else word for word in arguments]
        text = next((word.partition("=")[2] for word in arguments if word.startswith("data=")), "python_docs")
        small = [*SMALL, f"data.{text}.windows=2", f"data.{text}.seqlen=64"]
        if "model=quantized" in arguments:
            small = [one for one in small if not one.startswith("data.")] + [*LATENCY, "offload.spare=2"]
        done = launch(*arguments, *small, "result_cache.enabled=false")
        assert done.code == 0, done.err
        return
    arguments = arguments + EXTRA.get(name, []) + (EXTRA.get(arguments[0], []) if name == "offload" else [])
    main = importlib.import_module(f"haq_lab.cli.{COMMANDS[name][0]}").main
    with mock.patch.object(sys, "argv", [name, *arguments]):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        else:
            code = 0
    assert code == 0


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """`tried("A researcher")` runs the commands below this heading, in a folder with what the user has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    starts = {}
    for number, line in enumerate(PAGE.read_text().splitlines(), start=1):
        if line.startswith("## "):
            starts[line[3:]] = number

    def run(user: str) -> Path:
        start = starts[user]
        end = min((other for other in starts.values() if other > start), default=10**6)
        for block in blocks(PAGE, "python"):
            if start < block.line < end and block.text.startswith('"""'):
                Path("mine.py").write_text(block.text)
        own = [command for command in commands(PAGE) if start < command.block.line < end]
        assert own
        for command in own:
            _run(command.words)
        return tmp_path

    return run


def test_a_researcher_gets_a_table_and_a_figure(tried):
    for name in ("text", "training"):
        line = f"of the {name}, which is long enough for a window of tokens. "
        Path(f"{name}.txt").write_text("\n".join(f"Line {number} {line * 3}" for number in range(99)))
    folder = tried("A researcher")
    source = (folder / "tables.tex").read_text()
    assert [method in source for method in ("RTN &", "GPTQ &", "HAQ &", "per token", "static")] == [True] * 5
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(folder / "table.csv")) == 6


@pytest.mark.slow  # two minutes, most of them to fit what the policies need
def test_an_engineer_sees_hit_rates_and_a_plan(tried):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = TinyModel("mixtral").folder()
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained("model")
    AutoTokenizer.from_pretrained(source).save_pretrained("model")
    folder = tried("An engineer")
    runs = [json.loads(path.read_text()) for path in folder.glob("runs/sweep/*/results.json")]
    rates = {run["config"]["offload"]["budget"]: run["metrics"]["offload.hit_rate_pairs"] for run in runs}
    assert set(rates) == {"25%", "50%", "75%"}
    assert all(0 <= rate <= 1 for rate in rates.values())
    assert {path.name for path in folder.glob("runs/*/*.csv")} >= {"hit_rates.csv", "plan.csv"}


def test_an_author_sees_the_own_method_beside_haq(tried, capsys):
    tried("An author")
    printed = capsys.readouterr().out
    assert "Clipped" in printed
    assert "quantizer=haq" in printed
