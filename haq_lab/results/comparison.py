"""Compare runs by the paired differences of their windows, and say whether a difference is beyond noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from glob import glob
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from haq_lab.measure.estimate import combined, document_sums, estimate
from haq_lab.results.windows import Scores, require_same_windows, scores, stamps_of, windows_of
from haq_lab.utils.errors import UserError, nearest_beside

Runs = str | Path | Sequence[str | Path]  # a folder, a pattern of folders, or several folders

METRICS = ("kl", "nll")  # compared columns of windows.csv, quality by KL first
HIGHER_IS_BETTER = ("token_agreement",)
FLIPS = 9999  # random sign flips; all are tried if there are fewer
ALPHA = 0.05  # a difference is beyond noise if its corrected p is less


class _Run(NamedTuple):
    """The parts of a run folder that a comparison reads."""

    folder: Path
    windows: pd.DataFrame
    stamps: dict[str, dict[str, Any]]


def run_folders(pattern: str | Path) -> list[Path]:
    """Return the folders of the finished runs that a pattern names.

    Args:
        pattern: A run folder, or a pattern such as `runs/sweep/*quantizer=haq*`.

    Raises:
        UserError: There is none.
    """
    paths = [Path(pattern), *map(Path, sorted(glob(str(pattern))))]  # noqa: PTH207  # Path.glob refuses absolute ones
    folders = [path for path in dict.fromkeys(paths) if (path / "results.json").is_file()]
    if not folders:
        hint = nearest_beside(Path(pattern)) or ". Name the folder of a finished run."
        raise UserError(f"RUNS: '{pattern}' is not the folder of a finished run{hint}")
    return folders


def _read(group: Runs) -> list[_Run]:
    """Read the runs of a group, each once however many other groups it is compared with."""
    runs = []
    for folder in run_folders(group) if isinstance(group, str | Path) else map(Path, group):
        if (table := windows_of(folder)) is None:
            raise UserError(
                f"compare: '{folder}' has no windows.csv. Name the folder of a finished run with measure=[perplexity]; "
                "an older run has to run again with force=true."
            )
        runs.append(_Run(folder, table, stamps_of(folder)))
    return runs


def compare(first: Runs, second: Runs, names: tuple[str, str] = ("A", "B")) -> pd.DataFrame:
    """Compare two groups of runs on the same windows. In Python it is also `haq_lab.results.compare`.

    Args:
        first: A run folder, a pattern of folders such as `runs/sweep/*quantizer=haq*`, or a list of folders. Several
            folders are runs that differ only in their seeds.
        second: The other group.
        names: Names of the groups, for the table.

    Returns:
        One row for each text and metric (`kl`, in nats a token, and `nll`, the logarithm of the perplexity):

        - `first`, `second`, `data`, `metric`
        - `first_mean`, `second_mean`: the means, in nats a token
        - `difference`, `stderr`, `low`, `high`: first minus second, its standard error and its 95 % interval, paired
          over the windows. The error contains the seeds if a group has several runs.
        - `p`: of a sign-flip test over documents; `p_holm`: corrected for the number of comparisons (Holm)
        - `windows_needed`: about how many windows would separate the groups if the difference stays as it is
        - `verdict`: the better group, or `no difference beyond noise`

        KL is left out if the groups have different full-precision models.

    Raises:
        UserError: A run has no windows, or the groups were not evaluated on the same windows.

    Example:
        >>> compare("runs/sweep/quantizer=haq", "runs/sweep/quantizer=gptq")[["data", "metric", "verdict"]]
    """
    return _corrected(_rows(_read(first), _read(second), names))


def compare_all(groups: Mapping[str, Runs]) -> pd.DataFrame:
    """Compare every pair of groups of runs, as `compare` does. `p_holm` is corrected for all pairs.

    Args:
        groups: Run folders of each group, by the group's name.

    Raises:
        UserError: There are fewer than two groups, or two groups cannot be compared.
    """
    if len(groups) < 2:
        raise UserError(f"compare: {len(groups)} group of runs cannot be compared. Name at least two.")
    read = {name: _read(folders) for name, folders in groups.items()}
    pairs = combinations(read, 2)
    return _corrected([row for one, other in pairs for row in _rows(read[one], read[other], (one, other))])


def compare_with(
    first: tuple[str, Runs],
    others: Mapping[str, Runs],
    text: str,
    metric: str,
) -> pd.DataFrame:
    """Compare one group of runs with each of the others on one text, by one metric, as `compare` does.

    Args:
        first: Name and run folders of the group.
        others: Run folders of the other groups, by name.
        text: Name of the text.
        metric: `kl`, `nll` or `token_agreement`.

    Raises:
        UserError: A run has no windows, or the groups were not evaluated on the same windows.
    """
    name, folders = first
    ours = _read(folders)
    rows = [row for other, own in others.items() for row in _rows(ours, _read(own), (name, other), (metric,))]
    return _corrected([row for row in rows if row["data"] == text])


def _rows(
    first: Sequence[_Run], second: Sequence[_Run], names: tuple[str, str], metrics: Sequence[str] = METRICS
) -> list[dict[str, Any]]:
    runs = [*first, *second]
    tables = [run.windows for run in runs]
    texts = [text for text in dict.fromkeys(tables[0]["data"]) if all(text in set(table["data"]) for table in tables)]
    if not texts:
        raise UserError(f"compare: '{names[0]}' and '{names[1]}' share no text. Run both with the same data option.")
    rows = []
    for text in texts:
        for run in runs[1:]:
            names_of_runs = str(runs[0].folder), str(run.folder)
            require_same_windows(text, runs[0].stamps[text], run.stamps[text], names_of_runs)
        for metric in metrics:
            if metric != "nll" and not _same_reference(tables, text):
                continue
            ours = scores(tables[: len(first)], text, metric)
            theirs = scores(tables[len(first) :], text, metric)
            if ours is not None and theirs is not None:
                rows.append(
                    {"first": names[0], "second": names[1], "data": text, "metric": metric} | _test(ours, theirs)
                )
    return rows


def _same_reference(tables: Sequence[pd.DataFrame], text: str) -> bool:
    """Return whether all runs compare with the same full-precision model."""
    found = scores(tables, text, "nll_fp")
    return found is not None and bool(np.allclose(found.values, found.values[0], rtol=1e-4))


def _test(ours: Scores, theirs: Scores) -> dict[str, Any]:
    """Return the means, the paired difference with its error, and p of two groups."""
    paired = ours.values.mean(axis=0) - theirs.values.mean(axis=0)
    text = estimate(paired, ours.documents)
    parts = [(text.stderr**2, len(set(ours.documents)) - 1)]
    for group in (ours.values, theirs.values):
        if len(group) > 1:
            parts.append((float(group.mean(axis=1).var(ddof=1)) / len(group), len(group) - 1))
    found = combined(text.mean, parts)
    half = found.high - found.mean
    needed = math.inf if not found.mean else len(paired) * (half / found.mean) ** 2
    return {
        "first_mean": float(ours.values.mean()),
        "second_mean": float(theirs.values.mean()),
        **dict(zip(("difference", "stderr", "low", "high"), found, strict=True)),
        "p": sign_flip_p(document_sums(paired, ours.documents)),
        "windows_needed": needed,
    }


def sign_flip_p(values: NDArray[np.float64]) -> float:
    """Return p of the test that paired differences are symmetric around zero, by flipping their signs.

    Args:
        values: (n,) differences. All 2^n flips are tried if they are few, otherwise a fixed random sample.

    Example:
        >>> sign_flip_p(np.array([1.0, 1.0, 1.0, 1.0]))
        0.125
    """
    from scipy.stats import permutation_test

    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    test = permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=FLIPS, rng=np.random.default_rng(0), vectorized=True
    )
    return float(test.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method. NaN stays NaN and counts for nothing.

    Args:
        p: The p-values.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).

    Example:
        >>> holm([0.01, 0.04])
        [0.02, 0.04]
    """
    corrected, largest = list(p), 0.0
    order = sorted((index for index, value in enumerate(p) if not math.isnan(value)), key=lambda index: p[index])
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, p[index] * (len(order) - place)))
        corrected[index] = largest
    return corrected


def _corrected(rows: list[dict[str, Any]]) -> pd.DataFrame:
    least = math.ceil(math.log2(2 * len(rows) / ALPHA)) if rows else 0  # with fewer, no flips are rare enough
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
        row["windows_needed"] = max(row["windows_needed"], least)
        row["verdict"] = _verdict(row)
    return pd.DataFrame(rows)


def _verdict(row: dict[str, Any]) -> str:
    """Return which group is better. Both the interval and the corrected test must exclude zero."""
    if math.isnan(row["stderr"]):
        return "no error is known, because there is only one window"
    beyond_noise = row["low"] * row["high"] > 0 and row["p_holm"] < ALPHA
    if not beyond_noise:
        return "no difference beyond noise"
    first_is_better = (row["difference"] < 0) != (row["metric"] in HIGHER_IS_BETTER)
    return f"{row['first'] if first_is_better else row['second']} is better"
