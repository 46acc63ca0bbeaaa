"""Runs, replays and plans as one page: `python -m haq_lab.report DIR... -o report.html [--latex tables.tex]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from haq_lab.config.explain import report_user_errors
from haq_lab.utils.atomic_files import write_text
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    about = "One self-contained page about all runs, replays and plans below DIR: tables, figures, stamps, failures."
    parser = argparse.ArgumentParser(prog="python -m haq_lab.report", description=about)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run folder, or one that holds some")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="report.html")
    parser.add_argument("--title", help="of the page; else the folders' names")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="write the result tables as LaTeX, too")
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.report"):
        _report(given)


def _report(given: argparse.Namespace) -> None:
    from haq_lab.report.collect import collect
    from haq_lab.report.latex import latex
    from haq_lab.report.page import page
    from haq_lab.report.tables import published_table, result_tables

    found = collect(*given.folders)
    if found.runs.empty and not found.studies:
        raise UserError(f"there are no runs, replays or plans below {', '.join(given.folders)}")
    title = given.title or ", ".join(Path(folder).resolve().name for folder in given.folders)
    write_text(given.out, page(found, title))
    say(f"report: {given.out} ({given.out.stat().st_size / 1e6:.1f} MB)")
    if given.latex:
        published = published_table(found)
        write_text(given.latex, latex([*result_tables(found), *([published] if published else [])]))
        say(f"tables: {given.latex}")


if __name__ == "__main__":
    main()
