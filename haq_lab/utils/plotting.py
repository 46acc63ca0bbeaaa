"""Save figures whole or not at all."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from haq_lab.utils.atomic_files import atomic_file

FORMATS = ("png", "svg", "pdf")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of its ending, aside first."""
    with atomic_file(path) as aside:
        figure.savefig(aside, format=path.suffix.lstrip("."), dpi=150)
    return path
