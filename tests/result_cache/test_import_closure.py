"""Test that the closure contains all code that a result depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from haq_lab.result_cache import keys
from haq_lab.result_cache.import_closure import import_closure
from haq_lab.utils.paths import PACKAGE

WORKERS = ["calibration.calibrator", "routing.cached", "pipeline.cached_baseline", "pipeline.sequential"]


# One process imports the libraries, and a fork of it each worker: the libraries take most of the time.
LOADED_BY = """
import importlib, json, os, sys
import torch, transformers
for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        files = [loaded.__file__ for name, loaded in sys.modules.items() if name.split(".")[0] == "haq_lab"]
        print(module, json.dumps(files), flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, module
"""


@pytest.fixture(scope="module")
def loaded():
    """The files of haq_lab that Python loads, by the module that is imported first."""
    command = [sys.executable, "-c", LOADED_BY, *(f"haq_lab.{name}" for name in WORKERS)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = (line.partition(" ") for line in printed.splitlines())
    return {module: {Path(name) for name in json.loads(files)} for module, _, files in lines}


@pytest.mark.slow
@pytest.mark.xdist_group("import_closure")  # one worker makes the fixture
@pytest.mark.parametrize("module", [f"haq_lab.{name}" for name in WORKERS])
def test_it_contains_all_files_that_python_loads(module, loaded):
    """Importing the module in a fresh process loads no file of the package that is not in its closure."""
    assert len(loaded[module]) > 10
    assert loaded[module] - import_closure(module) == set()


def test_imports_inside_functions_count():
    assert PACKAGE / "int8" / "cuda" / "cupy_runner.py" in import_closure("haq_lab.int8.cuda.device")


def test_other_packages_and_unimported_modules_do_not_count():
    assert import_closure("torch") == set()
    inside = {path.relative_to(PACKAGE).parts[0] for path in import_closure("haq_lab.routing.cached")}
    assert inside & {"cli", "report", "tracking", "offload"} == set()


def test_a_module_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"haq_lab\.calibration\.callibrator: haq_lab has no such module"):
        import_closure("haq_lab.calibration.callibrator")


def test_the_key_follows_a_change_in_imported_code(monkeypatch):
    """A change of a file deep in the closure changes the key. A change outside does not."""
    changed: set[Path] = set()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path in changed))

    def key() -> str:
        keys._code_hash.cache_clear()
        return keys.key_of("trace", ("haq_lab.routing.cached",))

    before = key()
    changed.add(PACKAGE / "cli" / "main.py")
    assert key() == before
    changed.add(PACKAGE / "int8" / "numerics.py")
    assert key() != before
    keys._code_hash.cache_clear()
