"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. A column without any entry is left out.

    Args:
        head: Titles of the columns.
        rows: Entries of each row.

    Example:
        >>> print(table(["name", "note"], [["a", ""], ["b", ""]]))
        | name |
        |---|
        | a |
        | b |
    """
    rows = [[_cell(entry) for entry in row] for row in rows]
    shown = [column for column in range(len(head)) if any(row[column] for row in rows)]
    lines = [[head[column] for column in shown], *([row[column] for column in shown] for row in rows)]
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, "|" + "---|" * len(shown))
    return "\n".join(text)


def code(text: object) -> str:
    """Return a text as code."""
    return f"`{text}`"


def _cell(entry: str) -> str:
    return " ".join(entry.split()).replace("|", "\\|")
