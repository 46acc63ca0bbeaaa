"""The built wheel works in an empty folder: configs and kernels travel inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launching import TINY

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel, built without network and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_configs_and_kernels_are_inside(unpacked):
    for name in ("conf", "kernels"):
        inside = {str(path.relative_to(unpacked / "haq_lab")) for path in (unpacked / "haq_lab" / name).rglob("*")}
        assert inside == {str(path.relative_to(ROOT)) for path in (ROOT / name).rglob("*")}


@pytest.mark.slow
def test_it_runs_from_an_empty_folder(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    where = "import haq_lab, sys; sys.exit(str(haq_lab.__file__))"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert str(unpacked) in found.stderr
    command = [sys.executable, "-m", "haq_lab"]
    helped = subprocess.run([*command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "tiny_llama" in helped.stdout
    run = subprocess.run([*command, *TINY], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert len(list(tmp_path.glob("runs/*/results.json"))) == 1
