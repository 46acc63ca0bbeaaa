"""Compare the quality of runs: `python -m haq_lab.results compare A B`, or `compare SWEEP --by quantizer`.

A and B are run folders or patterns such as 'runs/sweep/*haq*'. A pattern of several runs is one group: runs that differ
only in their seeds. KL divergence is compared first, because it has less noise than perplexity.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from haq_lab.config.explain import report_user_errors
from haq_lab.results.comparison import compare_all, run_folders
from haq_lab.results.load import load
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.console import print_table, say
from haq_lab.utils.errors import UserError, nearest

LABELS = {"kl": "KL", "nll": "ln perplexity"}


def main(arguments: list[str]) -> None:
    """Parse the arguments and print the comparison.

    Args:
        arguments: Command line arguments after `compare`.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m haq_lab.results compare", description=__doc__, formatter_class=form
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folder of a run, or a pattern in quotes")
    parser.add_argument(
        "--by",
        metavar="COLUMN",
        help="compare the values of a column of all runs below RUNS, such as quantizer or config.quantizer.activations",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all columns of the comparison to a CSV file")
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.results compare"):
        if given.by:
            table = compare_all(_groups_of_column(given.runs, given.by))
        else:
            table = compare_all({name: run_folders(name) for name in given.runs})
        _show(table)
        if given.csv:
            with atomic_file(given.csv) as temporary:
                table.to_csv(temporary, index=False)
            say(f"table: {given.csv}")


def _groups_of_column(folders: list[str], column: str) -> dict[str, Sequence[Path]]:
    """Return the folders of the finished runs by the values of a column."""
    runs = load(*folders)
    runs = runs[runs["status"] == "finished"]
    names = list(map(str, runs))
    found = next((name for name in (column, f"config.{column}") if name in names), None)
    if found is None:
        hint = nearest(column, names) or ". `--csv` of `python -m haq_lab.results` lists all columns."
        raise UserError(f"--by: there is no column '{column}'{hint}")
    return {str(value): [Path(path) for path in own["folder"]] for value, own in runs.groupby(found, sort=False)}


def _show(comparison: pd.DataFrame) -> None:
    table = Table("data", "metric", "first", "second", "difference", "p (Holm)", "windows needed", "verdict")
    for row in comparison.to_dict("records"):
        table.add_row(
            row["data"],
            LABELS[row["metric"]],
            f"{row['first']}: {row['first_mean']:.5f}",
            f"{row['second']}: {row['second_mean']:.5f}",
            f"{row['difference']:+.5f} ± {row['stderr']:.5f}",
            f"{row['p']:.2g} ({row['p_holm']:.2g})",
            _needed(row),
            row["verdict"],
        )
    print_table(table)
    say("Differences in nats a token, first minus second, paired over the windows, with standard error.")


def _needed(row: Mapping[Any, Any]) -> str:
    """Return how many windows would separate two groups, if more are needed than there are."""
    if row["verdict"] != "no difference beyond noise" or not row["windows_needed"] < 1e6:
        return ""
    return f"{row['windows_needed']:,.0f}"
