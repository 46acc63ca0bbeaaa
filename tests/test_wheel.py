"""The built wheel works in an empty folder: configs and kernels travel inside."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from launching import TINY

ROOT = Path(__file__).parents[1]


EXTRAS = ("wandb", "mlflow", "trackio", "matplotlib", "plotly", "lm_eval", "fastapi", "uvicorn", "openai", "optuna")
# Hides the packages of the extras, as in an environment with only the core.
CORE_ONLY = f"""
import sys
from importlib.machinery import PathFinder

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Core
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution, built without network."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def test_the_index_takes_them(dist):
    """PyPI's own check of the metadata and the long description, and no file is where it does not belong."""
    for module, files in (("twine check --strict", dist.iterdir()), ("check_wheel_contents", dist.glob("*.whl"))):
        name, *options = module.split()
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        command = [sys.executable, "-m", name, *options, *map(str, files)]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stdout


def test_the_metadata_say_who_and_what(unpacked):
    metadata = message_from_string(next(unpacked.glob("*.dist-info/METADATA")).read_text())
    assert metadata["Author"] == "haq_lab contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert (unpacked / "haq_lab" / "py.typed").is_file()
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in core if line.startswith(EXTRAS)]


def test_the_source_distribution_builds_the_same_wheel(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "conf/config.yaml", "haq_lab/api.py"} <= names
    assert any(name.startswith("kernels/") for name in names)
    assert not [name for name in names if name.startswith((".venv", "runs", "dist"))]


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


@pytest.mark.slow
def test_the_core_runs_without_extras_and_names_those_that_a_feature_needs(unpacked, tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "sitecustomize.py").write_text(CORE_ONLY)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'core'}:{unpacked}"}
    tiny = [setting for setting in TINY if not setting.startswith("tracking")]

    def call(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    run = call("haq_lab", *tiny, "checkpoint.dir=checkpoint", "hydra.run.dir=run")
    assert (run.returncode, run.stderr) == (0, "")
    assert re.findall(r"pip install '(.*?)'", run.stdout) == ["haq-lab[wandb]", "haq-lab[report]"]
    written = call("haq_lab.generate", "checkpoint", "Once", "--max-tokens=2", "--backend=reference")
    assert written.returncode == 0, written.stderr
    needs = "needs the package '{}', which is not installed. Run: pip install 'haq-lab[{}]'\n"
    for module, arguments, feature, package, extra in (
        ("haq_lab.report", ["run"], "haq_lab.report: the report", "matplotlib", "report"),
        ("haq_lab.results", ["run", "--figure", "x.png"], "haq_lab.results: --figure", "matplotlib", "report"),
        ("haq_lab.serve", ["checkpoint"], "haq_lab.serve: the server", "fastapi", "serve"),
        ("haq_lab", [*TINY, "measure=[lm_eval]"], "haq_lab: measure=[lm_eval]", "lm_eval", "lm-eval"),
        ("haq_lab", [*tiny, "tracking=mlflow"], "haq_lab: tracking=mlflow", "mlflow", "mlflow"),
    ):
        told = call(module, *arguments)
        assert (told.returncode, told.stderr) == (2, f"{feature} {needs.format(package, extra)}")
