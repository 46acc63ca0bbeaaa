"""What a run shows while it works and when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table


def plain(**settings: Any) -> Console:
    """A console that shows texts as they are; `quantizer.fold=[norm]` is no markup."""
    return Console(highlight=False, markup=False, **settings)


console, errors = plain(), plain(stderr=True)
FILE_WIDTH = 200  # columns, where there is no terminal to be narrower


def say(line: str, on: Console = console) -> None:
    """One plain line, never wrapped."""
    on.print(line, soft_wrap=True)


def print_table(table: Table) -> None:
    """As wide as the terminal; into a file or a pipe wide enough to cut no name."""
    wide = console if console.is_terminal else plain(file=console.file, width=FILE_WIDTH)
    wide.print(table)


class Progress:
    """A bar over the layers, and a line for what comes before and after."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bars.add_task("start", total=None)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def stage(self, name: str) -> None:
        """A stage without a known length."""
        self._bars.update(self._task, description=name)

    def layers(self, depth: int, name: str, done: int = 0) -> None:
        """The pass over the layers begins, at layer `done`."""
        self._bars.reset(self._task, total=depth, completed=done, description=name)

    def layer_done(self) -> None:
        """One more layer."""
        self._bars.advance(self._task)


def change(value: float, baseline: float) -> str:
    """`+0.40 %`: how far a value is from its baseline."""
    return f"{(value / baseline - 1) * 100:+.2f} %"


def show_results(results: dict[str, Any], folder: Path) -> None:
    """A finished run's figures as a table, and where they are."""
    metrics, run = results["metrics"], results["run"]
    title = f"{run['model']}  {run['quantizer']}"
    table = Table(Column("metric", overflow="fold"), "value", title=title, title_justify="left")
    for name, value in metrics.items():
        if name.startswith("time."):
            continue
        note = ""
        dataset = name.partition(".")[2]
        if name.startswith("perplexity.") and (fp := metrics.get(f"perplexity_fp.{dataset}")):
            note = f"  ({change(value, fp)})"
        table.add_row(name, readable(name, value) + note)
    print_table(table)
    say(f"run folder: {folder}")


def readable(name: str, value: float) -> str:
    """A metric's value with its unit."""
    if "bytes" in name.rpartition(".")[2].split("_"):  # `weights_bytes`, `bytes_moved`
        return f"{value / 1e6:,.1f} MB"
    if name.startswith(("perplexity", "latency")):
        return f"{value:,.4g}" if name.startswith("latency") else f"{value:,.4f}"
    return f"{value:,.5g}"
