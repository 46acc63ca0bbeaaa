"""Estimate a mean from windows of text: its standard error and its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95  # share of intervals that contain the true value


class Estimate(NamedTuple):
    """A mean and its error.

    Attributes:
        mean: The mean.
        stderr: Its standard error. NaN if all values come from one document.
        low: Lower end of its 95 % interval. NaN like `stderr`.
        high: Upper end of its 95 % interval. NaN like `stderr`.
    """

    mean: float
    stderr: float
    low: float
    high: float


def estimate(values: ArrayLike, documents: Sequence[int] | None = None) -> Estimate:
    """Estimate the mean of a quantity over a text from its values on windows.

    Windows of one document resemble each other. So the error comes from the sums of the documents, which is what a
    bootstrap over documents converges to. With one window a document, it is the standard deviation of the windows over
    the root of their number. The interval is Student's, because there are often few documents.

    Args:
        values: (n,) values of the windows.
        documents: (n,) document of each window. None: each window counts as a document of its own.

    Returns:
        The mean, its standard error and its interval.

    Source:
        Liang and Zeger, "Longitudinal data analysis using generalized linear models", Biometrika 73 (1986).

    Example:
        >>> estimate([1.0, 2.0, 3.0, 4.0]).mean
        2.5
    """
    values = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore"):  # infinite values have no error
        mean, sums = float(values.mean()), document_sums(values - values.mean(), documents)
    if len(sums) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan)
    stderr = math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / len(values)
    half = student_quantile(len(sums) - 1) * stderr
    return Estimate(mean, stderr, mean - half, mean + half)


def combined(mean: float, parts: Sequence[tuple[float, int]]) -> Estimate:
    """Return the estimate whose variance is the sum of independent parts, such as that of the text and of the seeds.

    Args:
        mean: The mean.
        parts: Variance of the mean by each part, and its degrees of freedom.

    Returns:
        The mean, its standard error and its interval.

    Source:
        Welch, "The generalization of Student's problem", Biometrika 34 (1947), for the degrees of freedom.

    Example:
        >>> combined(1.0, [(0.03, 15), (0.01, 2)]).stderr
        0.2
    """
    variance = sum(part for part, _ in parts)
    weight = sum(part**2 / degrees for part, degrees in parts if part > 0)
    stderr = math.sqrt(variance)
    half = student_quantile(variance**2 / weight) * stderr if weight else math.nan if math.isnan(variance) else 0.0
    return Estimate(mean, stderr, mean - half, mean + half)


def document_sums(values: NDArray[np.float64], documents: Sequence[int] | None) -> NDArray[np.float64]:
    """Return the sum of the values (n,) of each document."""
    if documents is None:
        return values
    _, index = np.unique(np.asarray(documents), return_inverse=True)
    sums: NDArray[np.float64] = np.bincount(index, weights=values).astype(float)
    return sums


def student_quantile(degrees: float, level: float = LEVEL) -> float:
    """Return how many standard errors half of an interval has, by Student's distribution.

    Args:
        degrees: Degrees of freedom.
        level: Share of intervals that contain the true value.
    """
    from scipy.special import stdtrit  # lightweight, unlike scipy.stats

    return float(stdtrit(degrees, (1 + level) / 2))
