"""The built site loads nothing from other hosts, and each page is in its navigation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import ROOT

LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//")
LINKED = re.compile(r"<link\b(?![^>]*rel=[\"']?canonical)[^>]*?\bhref=[\"']?(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_it_loads_nothing_from_elsewhere(site):
    pages = [page for kind in ("*.html", "*.css") for page in site.rglob(kind)]
    assert len(pages) > 40
    assert [page.name for page in pages if LOADED.search(text := page.read_text()) or LINKED.search(text)] == []


@pytest.mark.slow
def test_it_has_the_pages_of_the_repository_and_no_scripts(site):
    assert (site / "guides/serve/index.html").is_file()
    assert (site / "experiments/rotation/index.html").is_file()
    assert 'href="../../experiments/rotation/"' in (site / "concepts/smoothing/index.html").read_text()
    assert "haq_lab.load" in (site / "reference/api/index.html").read_text()
    assert not list(site.rglob("*.py"))
