"""The fenced blocks of the README and of the documentation, and the commands in them.

A block without a language has shell commands. What a command needs, such as the hub, a cluster or a GPU, is said by a
line `<!-- needs: WHAT -->` above the block, or by a comment `# needs WHAT` behind the command. The tests only parse
such commands.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from haq_lab.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(?:<!-- needs: ([\w ]+) -->\n)?```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

MODULES = {name: name for name in COMMANDS} | {"result_cache": "cache"}  # by the name after `python -m haq_lab.`
PLUGINS = ("hydra/launcher", "hydra/sweeper", "hydra.sweeper", "hydra.launcher")
# What stands for a value of the user.
PLACEHOLDERS = {
    "FILE": "text.txt",
    "FOLDER": "model",
    "DIR": "checkpoints/smol",
    "TARGET": "target",
    "TARGET.gguf": "x.gguf",
    "ORGANISATION/NAME": "model",
    "NAME": "rtn",
    "SCHEME": "token",
}


class Block(NamedTuple):
    """A fenced block: its page, its first line, its language, its text, and what it needs."""

    page: Path
    line: int
    language: str
    text: str
    needs: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command of a block, as words, without comments and pipes, and what it needs."""

    block: Block
    words: list[str]
    needs: str


def blocks(page: Path, language: str) -> list[Block]:
    """Return the blocks of a page in a language."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3], match[1] or "")
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.language == language]


def commands(page: Path) -> list[Command]:
    """Return the shell commands of a page."""
    found = []
    for block in blocks(page, ""):
        for line in block.text.replace("\\\n", " ").splitlines():
            said = re.search(r"# .*\bneeds (?:the |an? )?(.+)$", line)
            found += [Command(block, words, said[1] if said else block.needs) for words in _pipeline(line)]
    return found


def _pipeline(line: str) -> list[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= {"|", "&"}:
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def entry(words: list[str]) -> tuple[str, list[str]]:
    """Return the command of `haq-lab` that words start, and its arguments. An empty name if it is another program."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[:2] == ["python", "-m"] and re.fullmatch(r"haq_lab(\.\w+)?", words[2]):
        return MODULES[words[2].partition(".")[2] or "run"], words[3:]
    if words[0] == "haq-lab":
        return (words[1], words[2:]) if words[1] in COMMANDS else ("run", words[1:])
    return "", words


def overrides_of(arguments: list[str]) -> list[str]:
    """Return the overrides of a run with placeholders replaced, and without the plug-ins of a sweep."""
    found = []
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not argument.startswith("-") and not name.startswith(PLUGINS):
            value = "training.txt" if (name, value) == ("calibration.path", "FILE") else PLACEHOLDERS.get(value, value)
            found.append(name + separator + value)
    return [re.sub(r"^experiment=", "+experiment=", one) for one in found]


def jobs(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each job of a sweep, so that each value of each setting is in one at least."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    parsed = [one for one in parsed if not one.is_interval_sweep()]  # a search draws these values itself
    seen: set[str] = set()
    found = []
    for job in BasicSweeper.split_arguments(parsed, None)[0]:
        if not set(job) <= seen:
            seen |= set(job)
            found.append([*job])
    return found
