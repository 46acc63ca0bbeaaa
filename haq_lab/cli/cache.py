"""`python -m haq_lab.result_cache ls|gc`: what runs have left for one another, and making room.

python -m haq_lab.result_cache ls                    a line for each stage, --all for each artefact
python -m haq_lab.result_cache gc --limit 5GB        until so much is left; --limit 0B removes everything
"""

from __future__ import annotations

import argparse
import time
from itertools import groupby
from pathlib import Path

from rich.table import Table

from haq_lab.config.help import report_user_errors
from haq_lab.result_cache.eviction import Entry, entries, remove_leftovers, trim
from haq_lab.result_cache.settings import ResultCache, bytes_of
from haq_lab.utils.console import print_table, say


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m haq_lab.result_cache", description="What runs have left for one another."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("ls", help="list what is there")
    listing.add_argument("--all", action="store_true", help="every artefact, those unused for longest first")
    collecting = commands.add_parser("gc", help="remove what was unused for longest")
    collecting.add_argument("--limit", default=ResultCache().max_size, metavar="SIZE", help="what may stay, as 20GB")
    for command in (listing, collecting):
        command.add_argument("--dir", metavar="DIR", help="the store's folder (result_cache.dir)")
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.result_cache"):
        folder = ResultCache(dir=given.dir).folder
        if given.command == "ls":
            show(folder, given.all)
        else:
            collect(folder, bytes_of(given.limit))


def show(folder: Path, every: bool) -> None:
    """A table on the terminal."""
    there = entries(folder)
    table = Table("stage", "of" if every else "artefacts", "MB", "last used", title=str(folder), title_justify="left")
    if every:
        for entry in there:
            table.add_row(entry.stage, entry.about(), *_size_and_use([entry]))
    else:
        for stage, group in groupby(sorted(there, key=lambda entry: entry.stage), key=lambda entry: entry.stage):
            own = list(group)
            table.add_row(stage, str(len(own)), *_size_and_use(own))
    print_table(table)
    say(f"{len(there)} artefacts, {sum(entry.bytes for entry in there) / 1e6:,.1f} MB in {folder}")


def collect(folder: Path, limit: int) -> None:
    """Remove artefacts beyond `limit` bytes, and what killed processes left."""
    left = remove_leftovers(folder)
    gone, freed = trim(folder, limit)
    say(f"removed {gone} artefacts, {freed / 1e6:,.1f} MB, and {left} unfinished files from {folder}")


def _size_and_use(some: list[Entry]) -> tuple[str, str]:
    size, used = sum(entry.bytes for entry in some), max(entry.used for entry in some)
    return f"{size / 1e6:,.1f}", time.strftime("%Y-%m-%d %H:%M", time.localtime(used))


if __name__ == "__main__":
    main()
