"""List and trim the result cache: `python -m haq_lab.result_cache ls|gc`.

python -m haq_lab.result_cache ls                    list the stages; --all lists every result
python -m haq_lab.result_cache gc --limit 5GB        remove the least recently used results until 5 GB are left
python -m haq_lab.result_cache gc --limit 0B         remove everything
"""

from __future__ import annotations

import argparse
import time
from itertools import groupby
from pathlib import Path

from rich.table import Table

from haq_lab.config.explain import report_user_errors
from haq_lab.result_cache.eviction import Entry, entries, remove_leftovers, trim
from haq_lab.result_cache.settings import ResultCache, parse_size
from haq_lab.utils.console import print_table, say


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run the command.

    Args:
        arguments: Command line arguments. If None, those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m haq_lab.result_cache", description="List and trim the results that runs share."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("ls", help="list the stored results")
    listing.add_argument("--all", action="store_true", help="list every result, least recently used first")
    collecting = commands.add_parser("gc", help="remove the least recently used results")
    collecting.add_argument(
        "--limit", default=ResultCache().max_size, metavar="SIZE", help="size that may stay, such as 20GB"
    )
    for command in (listing, collecting):
        command.add_argument("--dir", metavar="DIR", help="folder of the result cache (result_cache.dir)")
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.result_cache"):
        folder = ResultCache(dir=given.dir).folder
        if given.command == "ls":
            show(folder, given.all)
        else:
            collect(folder, parse_size(given.limit))


def show(folder: Path, every: bool) -> None:
    """Print a table of the results in a cache folder.

    Args:
        every: Whether to list every result. If false, a row is a stage.
    """
    results = entries(folder)
    table = Table("stage", "of" if every else "results", "MB", "last used", title=str(folder), title_justify="left")
    if every:
        for entry in results:
            table.add_row(entry.stage, entry.about(), *_size_and_use([entry]))
    else:
        for stage, group in groupby(sorted(results, key=lambda entry: entry.stage), key=lambda entry: entry.stage):
            members = list(group)
            table.add_row(stage, str(len(members)), *_size_and_use(members))
    print_table(table)
    say(f"{len(results)} results, {sum(entry.bytes for entry in results) / 1e6:,.1f} MB in {folder}")


def collect(folder: Path, limit: int) -> None:
    """Remove the least recently used results beyond `limit` bytes, and the temporary files of killed processes."""
    unfinished = remove_leftovers(folder)
    removed, freed = trim(folder, limit)
    say(f"removed {removed} results, {freed / 1e6:,.1f} MB, and {unfinished} unfinished files from {folder}")


def _size_and_use(results: list[Entry]) -> tuple[str, str]:
    size, used = sum(entry.bytes for entry in results), max(entry.used for entry in results)
    return f"{size / 1e6:,.1f}", time.strftime("%Y-%m-%d %H:%M", time.localtime(used))


if __name__ == "__main__":
    main()
