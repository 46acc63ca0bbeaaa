"""The console script `haq-lab`: `haq-lab COMMAND ...` is `python -m haq_lab.COMMAND ...`.

Only the module of the command is imported, so `haq-lab --help` is fast.
"""

from __future__ import annotations

import importlib
import sys

import haq_lab
from haq_lab.utils.errors import nearest

PROGRAM = "haq-lab"
COMMANDS = {  # name: (module in haq_lab.cli, description)
    "run": ("main", "quantise a model and measure it; -m for a sweep. `run` may be left out: haq-lab model=smol"),
    "results": ("results", "print all runs below a folder as a table"),
    "report": ("report", "write all runs below a folder as one page with figures"),
    "generate": ("generate", "generate text with a quantised model, or chat with it"),
    "serve": ("serve", "serve a quantised model to OpenAI clients"),
    "checkpoint": ("checkpoint", "inspect, verify, accept or export a quantised checkpoint"),
    "models": ("models", "build a model and check it"),
    "offload": ("offload", "record and replay routing traces, plan offloading, measure this machine"),
    "cache": ("cache", "list and trim the results that runs share"),
    "tracking": ("wandb_sync", "upload offline runs to W&B"),
}


def main() -> None:
    """Run the command that the first argument names. Exit with code 2 if there is no such command."""
    if "" not in sys.path:  # as with `python -m`, a class of the user's own is found in the current folder
        sys.path.insert(0, "")
    arguments = sys.argv[1:]
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h"):
        print(_help())
    elif first == "--version":
        print(f"{PROGRAM} {haq_lab.__version__}")
    elif first in COMMANDS:
        _run(first, arguments[1:])
    elif "=" in first or first.startswith("-"):  # an override or an option of a run
        _run("run", arguments)
    else:
        hint = nearest(first, COMMANDS) or f". `{PROGRAM} --help` lists all."
        print(f"{PROGRAM}: '{first}' is not a command{hint}", file=sys.stderr)
        sys.exit(2)


def _help() -> str:
    lines = [f"  {name:<12}{description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` explains a command. `{PROGRAM} run --help` lists all models and settings.",
            f"`{PROGRAM} --version` prints the version.",
        ]
    )


def _run(command: str, arguments: list[str]) -> None:
    """Run a command in this process."""
    module, _ = COMMANDS[command]
    sys.argv[1:] = arguments  # the name of the program stays, because Hydra's shell completion is installed for it
    importlib.import_module(f"haq_lab.cli.{module}").main()
