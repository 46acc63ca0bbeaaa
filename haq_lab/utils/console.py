"""Print lines, tables and progress bars to the terminal."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table


def plain(**settings: Any) -> Console:
    """Return a console without markup, so that text such as `quantizer.fold=[norm]` is printed unchanged."""
    return Console(highlight=False, markup=False, **settings)


console, errors = plain(), plain(stderr=True)
FILE_WIDTH = 200  # columns, if the output is not a terminal


def say(line: str, on: Console = console) -> None:
    """Print one line without wrapping."""
    on.print(line, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal. In a file or pipe it is wide enough to show all names."""
    wide = console if console.is_terminal else plain(file=console.file, width=FILE_WIDTH)
    wide.print(table)


class Progress:
    """A progress bar over the layers, and a line for each stage before and after them.

    Without a terminal, such as in a log file, each stage is one line with its time, printed when the stage ends.
    """

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal or console.is_jupyter),
        )
        self._task = self._bars.add_task("start", total=None)
        self._stage, self._started = "", 0.0

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()
        if error[0] is None:
            self._begin("")

    def _begin(self, name: str) -> None:
        """End a stage and begin the next one."""
        if self._stage and self._bars.disable:
            say(f"{self._stage}: {time.perf_counter() - self._started:.1f} s")
        self._stage, self._started = name, time.perf_counter()

    def stage(self, name: str) -> None:
        """Show a stage of unknown length."""
        self._begin(name)
        self._bars.update(self._task, description=name)

    def layers(self, depth: int, name: str, done: int = 0) -> None:
        """Start the progress bar over the layers.

        Args:
            depth: Number of layers.
            name: Description of the pass.
            done: Number of layers that are already done.
        """
        self._begin(name)
        self._bars.reset(self._task, total=depth, completed=done, description=name)

    def layer_done(self) -> None:
        """Advance the bar by one layer."""
        self._bars.advance(self._task)


def format_change(value: float, baseline: float, error: float | None = None) -> str:
    """Format the relative change of a value from its baseline, such as `+0.40 %` or `+0.40 ± 0.09 %`.

    Args:
        value: The value.
        baseline: The baseline.
        error: Standard error of the logarithm of value / baseline, if it is known.
    """
    return format_percent((value / baseline - 1) * 100, None if error is None else 100 * value / baseline * error)


def format_percent(change: float, error: float | None = None) -> str:
    """Format a change in percent, with its standard error in percent if it is known."""
    return f"{change:+.2f} %" if error is None or math.isnan(error) else f"{change:+.2f} ± {error:.2f} %"
