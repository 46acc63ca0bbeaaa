"""Print all runs below some folders as one table, or compare runs.

python -m haq_lab.results DIR... [--csv FILE] [--figure FILE] [--seeds]
python -m haq_lab.results compare A B
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from haq_lab.cli import compare
from haq_lab.config.explain import report_user_errors
from haq_lab.results.load import load, show, show_published
from haq_lab.results.published import beside
from haq_lab.results.seeds import seed_table, show_seeds
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError, invalid
from haq_lab.utils.extras import need


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and print the table.

    Args:
        arguments: Command line arguments. If None, those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        compare.main(arguments[1:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m haq_lab.results",
        description="Print all runs below DIR as one table. `compare A B` says whether two runs differ beyond noise.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run, or of several runs")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all columns of the table to a CSV file")
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw each run's change of perplexity from full precision (FILE.png or FILE.svg)",
    )
    parser.add_argument(
        "--seeds", action="store_true", help="one row for all runs that differ only in their seeds, with intervals"
    )
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.results"):
        _show(load(*given.folders), given)


def _show(runs: pd.DataFrame, given: argparse.Namespace) -> None:
    if runs.empty:
        say(f"no runs below {', '.join(given.folders)}")
        return
    if given.seeds:
        runs = seed_table(runs)
        show_seeds(runs)
    else:
        show(runs)
    show_published(beside(runs[runs["status"] == "finished"]))
    if given.csv:
        with atomic_file(given.csv) as temporary:
            runs.to_csv(temporary, index=False)
        say(f"table: {given.csv}")
    if given.figure:
        need("--figure", "report", "matplotlib")
        from haq_lab.results.figures import comparison_figure
        from haq_lab.utils.plotting import FORMATS

        if (suffix := given.figure.suffix.lstrip(".")) not in FORMATS:
            raise invalid("--figure", suffix, FORMATS)
        finished = runs[runs["status"] == "finished"]
        if not any(column.startswith("change_percent.") for column in map(str, finished)):
            raise UserError("--figure: no finished run has a perplexity. Run one with measure=[perplexity].")
        say(f"figure: {comparison_figure(finished, given.figure)}")


if __name__ == "__main__":
    main()
