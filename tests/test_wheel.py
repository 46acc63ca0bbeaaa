"""The built wheel works in an empty folder: configs and kernels travel inside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, EntryPoints
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


@pytest.mark.slow
def test_its_command_generates_text(unpacked, tmp_path):
    (entry,) = EntryPoints(
        EntryPoint(*line.split(" = "), group="console_scripts")
        for line in next(unpacked.glob("*.dist-info/entry_points.txt")).read_text().splitlines()
        if " = " in line
    )
    assert entry.name == "haq-lab"
    script = f"from {entry.module} import {entry.attr} as main; main()"
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}

    def call(*arguments: str) -> str:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert re.fullmatch(r"haq-lab \d+\.\d+\.\d+\S*\n", call("--version"))
    call("run", *TINY, "checkpoint.dir=checkpoint")
    assert call("generate", "checkpoint", "Once", "--max-tokens=4", "--backend=reference", "--temperature=0").strip()
    assert '"safetensors"' in call("checkpoint", "inspect", "checkpoint")
