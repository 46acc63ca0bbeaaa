"""The console script `haq-lab`: one command for all modules that have a command line."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launching import TINY

import haq_lab
from haq_lab.cli import commands

ROOT = Path(__file__).parents[2]


def _run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["/bin/haq-lab", *arguments])
    code = 0
    try:
        commands.main()
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_all_commands(monkeypatch, capsys, arguments):
    code, out, _ = _run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert set(commands.COMMANDS) <= set(re.findall(r"^  (\w+)", out, re.MULTILINE))


def test_version(monkeypatch, capsys):
    assert _run(monkeypatch, capsys, "--version") == (0, f"haq-lab {haq_lab.__version__}\n", "")


def test_an_unknown_command_gets_the_nearest(monkeypatch, capsys):
    code, out, err = _run(monkeypatch, capsys, "genrate")
    assert (code, out, err) == (2, "", "haq-lab: 'genrate' is not a command (did you mean 'generate'?)\n")


@pytest.mark.parametrize("name", sorted(set(commands.COMMANDS) - {"serve"}))
def test_each_command_has_a_module_with_main(name):
    module, _ = commands.COMMANDS[name]
    tree = ast.parse((ROOT / "haq_lab" / "cli" / f"{module}.py").read_text())
    assert "main" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize(
    ("arguments", "command", "rest"),
    [
        (["run", "model=smol"], "run", ["model=smol"]),
        (["model=smol", "quantizer=rtn"], "run", ["model=smol", "quantizer=rtn"]),
        (["-m", "quantizer=rtn,haq"], "run", ["-m", "quantizer=rtn,haq"]),
        (["-sc", "install=bash"], "run", ["-sc", "install=bash"]),
        (["+experiment=demo"], "run", ["+experiment=demo"]),
        (["cache", "ls", "--all"], "cache", ["ls", "--all"]),
        (["generate", "--help"], "generate", ["--help"]),
    ],
)
def test_the_first_argument_chooses_the_command(monkeypatch, capsys, arguments, command, rest):
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(commands, "_run", lambda name, others: started.append((name, others)))
    _run(monkeypatch, capsys, *arguments)
    assert started == [(command, rest)]


def test_a_command_gets_its_arguments(monkeypatch, capsys, tmp_path):
    code, out, _ = _run(monkeypatch, capsys, "cache", "ls", f"--dir={tmp_path}")
    assert (code, "0 results" in out) == (0, True)
    code, _, err = _run(monkeypatch, capsys, *TINY, "model=tiny_lama", f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert "did you mean 'tiny_llama'" in err


def test_help_imports_no_library():
    code = "import sys; from haq_lab.cli import commands; commands.main(); print({'torch', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n")


def test_the_script_is_installed_with_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"haq-lab": "haq_lab.cli.commands:main"}
