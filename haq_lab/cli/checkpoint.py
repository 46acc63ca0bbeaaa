"""Inspect, verify, accept or export a quantised checkpoint.

python -m haq_lab.checkpoint inspect DIR
python -m haq_lab.checkpoint verify DIR
python -m haq_lab.checkpoint accept DIR
python -m haq_lab.checkpoint export DIR TARGET --for transformers|vllm|gguf
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from haq_lab.config.explain import report_user_errors
from haq_lab.utils.console import errors, print_table, say


def main() -> None:
    """Run the command. Exit with code 0 on success and 2 if the input is wrong or the checkpoint is damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m haq_lab.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, run, description in (
        ("inspect", _inspect, "list the tensors and the provenance"),
        ("verify", _verify, "verify the hash of every tensor and file"),
        ("accept", _accept, "record the current files and hashes, after you have checked them; also for built models"),
        ("export", _export, "write the checkpoint in the format of another engine"),
    ):
        action = actions.add_parser(name, help=description)
        action.add_argument("folder", type=Path, help="folder of the checkpoint")
        action.set_defaults(run=run)
        if name == "export":
            action.add_argument("target", type=Path, help="folder, or GGUF file, to create for the export")
            action.add_argument(
                "--for",
                dest="engine",
                choices=("transformers", "vllm", "gguf"),
                default="transformers",
                help="transformers and vllm read compressed-tensors, gguf is for llama.cpp (default: %(default)s)",
            )
    arguments = parser.parse_args()
    with report_user_errors("haq_lab"):
        sys.exit(arguments.run(arguments))


def _inspect(arguments: argparse.Namespace) -> int:
    from haq_lab.checkpoint.inspect import summarize

    table, provenance = summarize(arguments.folder)
    print_table(table)
    say(json.dumps(provenance, indent=2))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from haq_lab.checkpoint.inspect import find_problems

    all_problems = list(find_problems(arguments.folder))
    for problem in all_problems:
        say(f"haq_lab: {problem}", on=errors)
    if not all_problems:
        say(f"{arguments.folder}: all tensors and files match their hashes")
    return 2 if all_problems else 0


def _accept(arguments: argparse.Namespace) -> int:
    from haq_lab.checkpoint.accept import accept

    files = accept(arguments.folder)
    say(f"{arguments.folder}: recorded {len(files)} files: {', '.join(files)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from haq_lab.checkpoint.export.engines import export

    export(arguments.folder, arguments.target, arguments.engine)
    say(f"exported to {arguments.target}")
    return 0


if __name__ == "__main__":
    main()
