"""Read the values of every evaluation window of runs (`windows.csv`), and average them over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from haq_lab.measure.estimate import Estimate, combined, estimate
from haq_lab.results.read_record import read_record
from haq_lab.utils.errors import UserError

FILE = "windows.csv"
NOT_COMPARED = ("comparable_with", "source")  # entries of a stamp that do not change what is scored


class Scores(NamedTuple):
    """The windows of one text, by run.

    Attributes:
        values: (runs, n) value of each window.
        documents: (n,) document of each window.
    """

    values: NDArray[np.float64]
    documents: list[int]


def windows_of(folder: Path) -> pd.DataFrame | None:
    """Return the windows of a run, or None if the run did not record them.

    Args:
        folder: The run folder.

    Returns:
        Columns as `haq_lab.measure.perplexity.score_windows` describes them, with `data` and `document`.
    """
    path = folder / FILE
    return pd.read_csv(path) if path.is_file() else None


def scores(tables: Sequence[pd.DataFrame], text: str, column: str) -> Scores | None:
    """Return one value of each window of a text, for runs on the same windows.

    Args:
        tables: Tables of `windows_of`.
        text: Name of the text.
        column: The value, such as `kl`.

    Returns:
        The values, or None if a run has none.
    """
    own = [table[table["data"] == text] for table in tables]
    if not own or any(column not in table or table[column].isna().any() or table.empty for table in own):
        return None
    return Scores(np.stack([table[column].to_numpy(float) for table in own]), own[0]["document"].tolist())


def over_seeds(found: Scores) -> Estimate:
    """Estimate the mean over the text and over the runs. The error contains both parts.

    Args:
        found: Windows of runs that differ only in their seeds. One run has no part of the seeds.

    Example:
        >>> over_seeds(Scores(np.array([[1.0, 3.0], [1.0, 3.0]]), [0, 1])).mean
        2.0
    """
    runs = len(found.values)
    text = estimate(found.values.mean(axis=0), found.documents)
    parts = [(text.stderr**2, len(set(found.documents)) - 1)]
    if runs > 1:
        parts.append((float(found.values.mean(axis=1).var(ddof=1)) / runs, runs - 1))
    return combined(text.mean, parts)


def stamps_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the protocol stamp of each text of a run."""
    record = read_record(folder / "results.json") or {}
    protocol: dict[str, dict[str, Any]] = record.get("protocol", {})
    return protocol


def require_same_windows(text: str, first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> None:
    """Check that two stamps describe the same windows.

    Args:
        text: Name of the text.
        first: Stamp of one run.
        second: Stamp of the other run.
        names: Names of both runs.

    Raises:
        UserError: They differ. The message names the first difference.
    """
    for entry in sorted({*first, *second} - {*NOT_COMPARED}):
        if first.get(entry) != second.get(entry):
            raise UserError(
                f"{text}: the runs cannot be compared, because {entry} is {first.get(entry)} in '{names[0]}' and "
                f"{second.get(entry)} in '{names[1]}'. Run both with the same data settings and the same tokenizer."
            )
