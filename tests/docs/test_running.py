"""The commands and the Python code of each page run from top to bottom, on tiny models and few tokens.

Not run is what needs something (`documented.Command.needs`), what never ends, and what measures this machine.
"""

from __future__ import annotations

import importlib
import io
import shutil
import sys
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
from documented import PAGES, Command, blocks, commands, entry, jobs, overrides_of
from launching import TINY, launch

from haq_lab.cli.commands import COMMANDS
from haq_lab.cli.offload import main as offload
from haq_lab.config.compose import compose_run
from haq_lab.models.sources import TinyModel

SMALL = {"smol": "tiny_llama", "smol_moe": "tiny_mixtral", "local": "rtx3060_12g"}
ENDLESS = ("serve",)
EXTRA = {  # arguments that make a command fast
    "generate": ["--backend=reference", "--max-tokens=2", "--temperature=0"],
    "trace": ["--windows=2", "--seqlen=32"],
    "plan": ["--tokens=2"],
}
MOST_JOBS = 4  # of a larger sweep, only the first job runs
ELSEWHERE = ("extending",)  # tests/test_extending.py runs the commands of this page, and applies its diffs first
WITH_COMMANDS = [page for page in PAGES if commands(page) and page.stem not in ELSEWHERE]
WITH_CODE = [page for page in PAGES if any(not block.needs for block in blocks(page, "python"))]
SIZES = ("calibration.samples=", "calibration.seqlen=", "measure.latency.", "tracking=")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with what the pages take for granted: checkpoints, runs, traces, texts and a model."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert launch(*TINY, "checkpoint.dir=checkpoints/smol", "hydra.run.dir=runs/first").code == 0
        moe = ["model=tiny_mixtral", "checkpoint.dir=checkpoints/smol_moe", "hydra.run.dir=runs/second"]
        assert launch(*TINY, *moe).code == 0
        assert launch("-m", *TINY, "quantizer=gptq,haq").code == 0
        for part, name in (("calibration", "profile"), ("evaluation", "test")):
            tiny = ["--part", part, "--windows=2", "--seqlen=32", f"--out={name}.trace"]
            offload(["trace", "tiny_mixtral", "python_docs", *tiny])
    for name in ("text", "training"):
        line = f"of the {name}, which is long enough for a window of tokens. "
        lines = [f"Line {number} {line * 3}" for number in range(99)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    shutil.copytree(TinyModel("llama").folder(), folder / "model")
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, as the working folder."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def _tiny(overrides: list[str]) -> list[str]:
    """Return the overrides of a run with a tiny model and few tokens in place of those that they name."""
    config = compose_run(overrides)[0]
    given = {name.lstrip("+") for name, _, _ in (one.partition("=") for one in overrides)}
    kept = [one for one in overrides if not one.startswith((*SIZES, "model=")) and ".windows=" not in one]
    small = ["tracking=none", "calibration.samples=4", "calibration.seqlen=64"]
    model = next((one.partition("=")[2] for one in overrides if one.startswith("model=")), "")
    if not model:
        model = "smol" if config.offload._target_ is None else "smol_moe"
    small.append(f"model={SMALL.get(model, model)}")
    small += [] if "backend" in given else ["backend=reference"]
    small += [] if config.offload._target_ is None else ["offload.spare=2"]  # tiny models have few experts
    small += [] if "result_cache.enabled" in given else ["result_cache.enabled=false"]
    for name, node in config.data.items():
        small += [f"data.{name}.windows=2", f"data.{name}.seqlen=64"] if "_target_" in node else []
    if "latency" in config.measure:
        small += ["measure.latency.seconds=0", "measure.latency.prompt_tokens=8", "measure.latency.decode_tokens=4"]
    if "lm_eval" in config.measure:
        small += ["measure.lm_eval.limit=2"]
    return [*(one for one in kept if ".seqlen=" not in one and "lm_eval.limit" not in one), *small]


def _run(command: Command, number: int) -> int:
    """Run a command in this process, and return its exit code."""
    name, arguments = entry(command.words)
    if name == "run" and "--help" not in arguments:
        overrides = overrides_of(arguments)
        for one in overrides:
            if one.startswith("checkpoint.dir="):
                shutil.rmtree(one.partition("=")[2], ignore_errors=True)
        every = jobs(overrides) if "-m" in arguments else [overrides]
        if any("experiment=" in one for one in overrides) or len(every) > MOST_JOBS:
            return launch(*_tiny(every[0])).code
        tiny = _tiny(every[0])
        swept = [one for one in overrides if one not in every[0] and not one.startswith("model=")]
        names = {one.partition("=")[0] for one in swept}
        tiny = [one for one in tiny if one.partition("=")[0] not in names]
        return launch(*(["-m"] if "-m" in arguments else []), *tiny, *swept).code
    arguments = [SMALL.get(word, f"target{number}" if word == "target" else word) for word in arguments]
    arguments += EXTRA.get(name, []) + (EXTRA.get(arguments[0], []) if name == "offload" else [])
    main = importlib.import_module(f"haq_lab.cli.{COMMANDS[name][0]}").main
    stdin = mock.patch.object(sys, "stdin", io.StringIO("Once upon a time"))
    with stdin, mock.patch.object(sys, "argv", [name, *arguments]):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page) and page.stem not in ELSEWHERE], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_run(page, work):
    numbers = count()
    for command in commands(page):
        name, arguments = entry(command.words)
        if name and not command.needs and name not in ENDLESS and arguments[:1] != ["profile"]:
            assert _run(command, next(numbers)) == 0, " ".join(command.words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(not block.needs for block in blocks(page, "python"))],
    ids=lambda page: page.stem,
)
def test_the_python_code_of_a_page_runs(page, work):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoTokenizer": AutoTokenizer}
    for block in blocks(page, "python"):
        if not block.needs:
            text = block.text.replace('"smol"', '"tiny_llama"').replace("max_new_tokens=20", "max_new_tokens=2")
            if "haq_lab.quantize" in text:
                shutil.rmtree("checkpoints/smol")
            exec(compile(text, block.place, "exec"), names)
    assert len(names) > 2
