"""Each command in the README and the documentation is valid, and runs on tiny models unless it says what it needs."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib

import pytest
from documented import PAGES, ROOT, blocks, commands, entry, jobs, overrides_of
from launching import launch

from docs.tools.commands import parsed
from haq_lab.cli.commands import COMMANDS
from haq_lab.cli.compare import main as compare
from haq_lab.config.build import build, refuse_ignored_settings, without_disabled_groups
from haq_lab.config.compose import compose_run

OTHERS = ("git", "cd")  # commands that every machine has
EVERY = [command for page in PAGES for command in commands(page)]


def _name(command) -> str:
    return f"{command.block.place} {' '.join(command.words)}"[:120]


def _check_run(arguments: list[str], sweep: bool, own: bool) -> None:
    """Compose and check the config of each job. With `own`, its classes are in files that do not exist here."""
    overrides = overrides_of(arguments)
    if not any(one.startswith("backend") for one in overrides):
        overrides.append("backend=reference")  # its kernels need not be compiled
    for job in jobs(overrides) if sweep else [overrides]:
        config = without_disabled_groups(compose_run(job)[0])
        refuse_ignored_settings(config, job, sweep=sweep)
        if not own:
            build(config)


def _extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("command", EVERY, ids=_name)
def test_a_command_is_valid(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "smol").mkdir(parents=True)
    name, arguments = entry(command.words)
    program = command.words[0]
    if name == "run":
        if "--help" not in arguments:
            _check_run(arguments, sweep="-m" in arguments, own=command.block.page.stem == "extending")
    elif name == "results" and arguments[0] == "compare":
        assert parsed(lambda: compare(arguments[1:]), arguments[1:]).arguments is not None
    elif name:
        main = importlib.import_module(f"haq_lab.cli.{COMMANDS[name][0]}").main
        if not {"--help", "--version"} & set(arguments):
            assert parsed(main, arguments).arguments is not None
    elif program == "make":
        assert re.search(rf"^{command.words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program == "pip":
        for word in command.words[2:]:
            for extra in filter(None, re.sub(r"^[\w.-]+(\[(.*)\])?.*$", r"\2", word).split(",")):
                assert extra in _extras()
    elif program in ("bash", "python") and not command.words[1].startswith("-"):
        assert (ROOT / command.words[1]).is_file()
    else:
        assert program in OTHERS or command.needs, (
            f"add `# needs {program}`, or a line <!-- needs: {program} --> above it"
        )


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page, "python")], ids=lambda block: block.place
)
def test_python_in_the_documentation_compiles(block):
    compile(block.text, block.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


TRANSCRIPTS = [
    (line.removeprefix("$ "), expected)
    for block in blocks(ROOT / "docs/faq.md", "console")
    if not block.needs
    for line, expected in re.findall(r"^\$ (.*)\n((?:[^$].*\n)+)", block.text, flags=re.MULTILINE)
]


@pytest.mark.parametrize(("command", "message"), TRANSCRIPTS)
def test_the_faq_has_the_real_messages(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command.split()[3:]
    fast = [] if any(one.startswith("backend=") for one in arguments) else ["backend=reference"]
    outcome = launch(*arguments, *fast, "tracking=none")
    assert outcome.code == 2
    assert message.strip() in outcome.err
