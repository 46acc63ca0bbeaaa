"""Save figures atomically."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from haq_lab.utils.atomic_files import atomic_file

FORMATS = ("png", "svg", "pdf")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, in the format of its file extension, and return the path."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip("."), dpi=150)
    return path
