"""What the report is tested on: `studied` (tests/conftest.py), and the page of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from haq_lab.cli import report as command


@pytest.fixture(scope="session")
def report(studied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about all of it, with LaTeX tables beside."""
    folder = tmp_path_factory.mktemp("report")
    command.main([str(studied), "-o", str(folder / "report.html"), "--latex", str(folder / "tables.tex")])
    return folder / "report.html"
