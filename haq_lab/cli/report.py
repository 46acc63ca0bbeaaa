"""Write one HTML page about runs, replays and plans.

python -m haq_lab.report DIR... -o FILE [--latex FILE] [--latex-columns perplexity,kl] [--latex-width one]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from haq_lab.config.explain import report_user_errors
from haq_lab.utils.atomic_files import write_text
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError
from haq_lab.utils.extras import need


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and write the page.

    Args:
        arguments: Command line arguments. If None, those of the process.
    """
    about = (
        "Write one self-contained HTML page about all runs, replays and plans below DIR: result tables, figures, "
        "protocols and failures."
    )
    parser = argparse.ArgumentParser(prog="python -m haq_lab.report", description=about)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run, or of several runs")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: report.html)"
    )
    parser.add_argument("--title", help="title of the page (default: the names of the folders)")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="also write tables as in a paper, in LaTeX")
    parser.add_argument(
        "--latex-columns",
        default="perplexity,kl",
        metavar="NAMES",
        help="columns of the LaTeX tables: perplexity, change, kl, token_agreement, or full names of other metrics, "
        "such as memory.weights_bytes (default: perplexity,kl)",
    )
    parser.add_argument(
        "--latex-width",
        default="one",
        metavar="one|two",
        help="columns of the page that a LaTeX table spans (default: one)",
    )
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.report"):
        _write(given)


def _write(given: argparse.Namespace) -> None:
    need("the report", "report", "matplotlib", "plotly")
    from haq_lab.report.collect import collect
    from haq_lab.report.page import page
    from haq_lab.report.paper_table import latex

    collection = collect(*given.folders)
    if collection.runs.empty and not collection.studies:
        raise UserError(f"there are no runs, replays or plans below {', '.join(given.folders)}. Name another folder.")
    title = given.title or ", ".join(Path(folder).resolve().name for folder in given.folders)
    tables = latex(collection, given.latex_columns.split(","), given.latex_width) if given.latex else ""
    write_text(given.out, page(collection, title))
    say(f"report: {given.out} ({given.out.stat().st_size / 1e6:.1f} MB)")
    if given.latex:
        write_text(given.latex, tables)
        say(f"tables: {given.latex}")


if __name__ == "__main__":
    main()
