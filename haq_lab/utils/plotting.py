"""Save figures atomically, and say when an axis needs a logarithmic scale."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from haq_lab.utils.atomic_files import atomic_file

FORMATS = ("png", "svg", "pdf")
HIDDEN = 1 / 20  # part of an axis within which values look alike
DECADES = 4  # the most that a logarithmic axis shows on each side of zero


def save(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, in the format of its file extension, and return the path."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip("."), dpi=150)
    return path


def needs_log(values: Iterable[float]) -> bool:
    """Return whether a large value hides the differences of others on a linear axis.

    That is so if the second smallest of at least three values takes less than `HIDDEN` of the axis.

    Args:
        values: Any values, by their size. Zeros, NaN and infinities do not count.

    Example:
        >>> needs_log([0.5, 3.0, 140.0])
        True
    """
    sizes = _sizes(values)
    return len(sizes) > 2 and bool(sizes[1] < HIDDEN * sizes[-1])


def linear_width(values: Iterable[float]) -> float:
    """Return the power of ten below which an axis of these values is nearly linear, so that it can contain zero.

    Args:
        values: Any values. Zeros, NaN and infinities do not count.

    Example:
        >>> linear_width([0.5, 3.0, 140.0])
        0.1
    """
    sizes = _sizes(values)
    if not len(sizes):
        return 1.0
    smallest, largest = np.floor(np.log10(sizes[[0, -1]]))
    return float(10 ** max(smallest, largest - DECADES))


def _sizes(values: Iterable[float]) -> NDArray[np.float64]:
    """Return the sizes of all finite values but zeros, in rising order."""
    sizes: NDArray[np.float64] = np.sort(np.abs(np.asarray(list(values), dtype=float)))
    return sizes[np.isfinite(sizes) & (sizes > 0)]
