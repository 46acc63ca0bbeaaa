"""Build a model and check it: `python -m haq_lab.models build NAME`."""

from __future__ import annotations

import argparse

from haq_lab.config.explain import report_user_errors
from haq_lab.utils.console import say


def main() -> None:
    """Run the command. Exit with code 2 if the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m haq_lab.models", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="build a model, check it and print its folder")
    build.add_argument("name", help="option of the group `model`, e.g. tiny_llama")
    build.add_argument("settings", nargs="*", help="settings of the model as model.SETTING=VALUE")
    arguments = parser.parse_args()
    with report_user_errors("haq_lab"):
        _build(arguments.name, arguments.settings)


def _build(name: str, settings: list[str]) -> None:
    from haq_lab.config.build import model_option

    source = model_option(name, settings)
    folder = source.folder()
    if hasattr(source, "check"):
        for line in source.check():
            say(line)
    say(f"{source.label}: {folder}")


if __name__ == "__main__":
    main()
