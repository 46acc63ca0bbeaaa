"""What the report is tested on: `studied` (tests/conftest.py), the page of it, and a browser where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haq_lab.cli import report as command

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def report(studied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about all of it, with LaTeX tables beside."""
    folder = tmp_path_factory.mktemp("report")
    command.main([str(studied), "-o", str(folder / "report.html"), "--latex", str(folder / "tables.tex")])
    return folder / "report.html"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here ({', '.join(BROWSERS)}); on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
