"""Quantised checkpoints: what is in one, whether it is whole, and export for other tools.

python -m haq_lab.checkpoint inspect DIR
python -m haq_lab.checkpoint verify DIR
python -m haq_lab.checkpoint export DIR TARGET
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from haq_lab.config.help import report_user_errors
from haq_lab.utils.console import errors, print_table, say


def main() -> None:
    """Exit codes: 0 done, 2 a mistake, or a checkpoint that is not as it was written."""
    parser = argparse.ArgumentParser(
        prog="python -m haq_lab.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, what in (
        ("inspect", "list its tensors and where it comes from"),
        ("verify", "check every tensor and file against its hash"),
        ("export", "write it in compressed-tensors' format"),
    ):
        action = actions.add_parser(name, help=what)
        action.add_argument("folder", type=Path, help="the checkpoint")
        if name == "export":
            action.add_argument("target", type=Path, help="a new folder")
    arguments = parser.parse_args()
    with report_user_errors("haq_lab"):
        sys.exit(globals()[f"_{arguments.action}"](arguments))


def _inspect(arguments: argparse.Namespace) -> int:
    from haq_lab.checkpoint.inspect import summary

    table, origin = summary(arguments.folder)
    print_table(table)
    say(json.dumps(origin, indent=2))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from haq_lab.checkpoint.inspect import problems

    found = list(problems(arguments.folder))
    for problem in found:
        say(f"haq_lab: {problem}", on=errors)
    if not found:
        say(f"{arguments.folder}: every tensor and file is as it was written")
    return 2 if found else 0


def _export(arguments: argparse.Namespace) -> int:
    from haq_lab.checkpoint.export import export

    export(arguments.folder, arguments.target)
    say(f"exported to {arguments.target}")
    return 0


if __name__ == "__main__":
    main()
