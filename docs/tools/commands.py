"""The arguments of all commands, from their parsers."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

from docs.tools.tables import code, table
from haq_lab.cli.commands import COMMANDS

METHODS = ("parse_args", "parse_intermixed_args")  # what the commands call


class Parsed(Exception):
    """Raised in place of running a command."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace | None):
        super().__init__()
        self.parser, self.arguments = parser, arguments


def parsed(main: Callable[..., None], arguments: list[str] | None) -> Parsed:
    """Parse the arguments of a command, and do not run it.

    Args:
        main: The command's function.
        arguments: Arguments to parse. If None, only the parser is returned.

    Raises:
        SystemExit: The parser refuses the arguments.
    """
    originals = {method: getattr(argparse.ArgumentParser, method) for method in METHODS}

    def stop(method: str) -> Callable[..., None]:
        def parse(parser: argparse.ArgumentParser, given: list[str] | None = None) -> None:
            raise Parsed(parser, None if arguments is None else originals[method](parser, given))

        return parse

    try:
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(sys, "argv", [sys.argv[0], *(arguments or [])]))
            for method in METHODS:
                patches.enter_context(mock.patch.object(argparse.ArgumentParser, method, stop(method)))
            main()
    except Parsed as result:
        return result
    raise AssertionError(f"{main.__module__} parses no arguments")


def commands() -> str:
    """Return a section for each command except `run`, whose settings have a page of their own."""
    sections = []
    for name, (module, description) in COMMANDS.items():
        if name == "run":
            continue
        parser = parsed(importlib.import_module(f"haq_lab.cli.{module}").main, None).parser
        sections.append(
            f"## {name}\n\n{description[0].upper()}{description[1:]}.\n\n{_section(f'haq-lab {name}', parser)}"
        )
        if name == "results":
            compare = parsed(lambda: importlib.import_module("haq_lab.cli.compare").main([]), None).parser
            sections.append(_section("haq-lab results compare", compare))
    return "\n\n".join(sections)


def _section(program: str, parser: argparse.ArgumentParser) -> str:
    """Return the usage and the table of a parser, and those of its commands."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if groups:
        help_of = {choice.dest: choice.help for choice in groups[0]._choices_actions}
        return "\n\n".join(
            f"**`{program} {name}`**: {help_of[name]}.\n\n{_section(f'{program} {name}', action)}"
            for name, action in groups[0].choices.items()
        )
    actions = [action for action in parser._actions if action.dest != "help"]
    usage = " ".join([program, *(_usage(action) for action in actions)])
    return f"```text\n{usage}\n```\n\n" + table(("argument", "meaning", "default"), map(_row, actions))


def _usage(action: argparse.Action) -> str:
    """Return an argument as it is typed, in brackets if it may be left out."""
    value = _value(action)
    if not action.option_strings:
        return {"*": f"[{value} ...]", "+": f"{value} [{value} ...]"}.get(str(action.nargs), value)
    text = " ".join(filter(None, [action.option_strings[-1], value]))
    return text if action.required else f"[{text}]"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return "|".join(map(str, action.choices))
    return str(action.metavar or action.dest.upper())


def _row(action: argparse.Action) -> tuple[str, str, str]:
    name = code(" ".join(filter(None, [", ".join(action.option_strings), _value(action)])))
    has_default = action.option_strings and action.nargs != 0 and action.default not in (None, [])
    about = (action.help or "") % {**vars(action), "prog": ""}
    return name, about, code(_default(action.default)) if has_default else ""


def _default(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
