"""Print all runs below some folders as one table: `python -m haq_lab.results DIR... [--csv FILE] [--figure FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from haq_lab.config.explain import report_user_errors
from haq_lab.results.load import load, show, show_published
from haq_lab.results.published import beside
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError, invalid


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m haq_lab.results", description="All runs below DIR as a table.")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run folder, or one that holds some")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the whole table, all columns")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw perplexities against full precision (png, svg)"
    )
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.results"):
        _report(load(*given.folders), given)


def _report(runs: pd.DataFrame, given: argparse.Namespace) -> None:
    if runs.empty:
        say(f"no runs below {', '.join(given.folders)}")
        return
    show(runs)
    show_published(beside(runs[runs["status"] == "finished"]))
    if given.csv:
        with atomic_file(given.csv) as aside:
            runs.to_csv(aside, index=False)
        say(f"table: {given.csv}")
    if given.figure:
        from haq_lab.results.figures import comparison_figure
        from haq_lab.utils.plotting import FORMATS

        if (suffix := given.figure.suffix.lstrip(".")) not in FORMATS:
            raise invalid("--figure", suffix, FORMATS)
        finished = runs[runs["status"] == "finished"]
        if not any(column.startswith("change_percent.") for column in map(str, finished)):
            raise UserError("--figure: no finished run has a perplexity to draw")
        say(f"figure: {comparison_figure(finished, given.figure)}")


if __name__ == "__main__":
    main()
