"""`python -m haq_lab.models build NAME`: make a model that is made here, and show that it is what it should be."""

from __future__ import annotations

import argparse

from haq_lab.config.help import report_user_errors
from haq_lab.utils.console import say


def main() -> None:
    """Parse the command line, build, print."""
    parser = argparse.ArgumentParser(prog="python -m haq_lab.models", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="make a model and check it")
    build.add_argument("name", help="an option of the group `model`")
    build.add_argument("settings", nargs="*", help="model.SETTING=VALUE")
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
