"""Heavy packages are imported when they are used, not before: a model loads without those that it does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import TINY, launch

ROOT = Path(__file__).parents[1]
HEAVY = [
    "pandas",
    "matplotlib",
    "plotly",
    "datasets",
    "wandb",
    "mlflow",
    "trackio",
    "numba",
    "lm_eval",
    "ray",
    "optuna",
]
LOAD = "import haq_lab; model, tokenizer = haq_lab.load(sys.argv[1], backend='reference')"
GENERATE = f"{LOAD}; model.generate(**tokenizer('a', return_tensors='pt'), max_new_tokens=2)"
FROM_PRETRAINED = (
    "import haq_lab.hf; import transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
)


def _imported(script: str, *arguments: str) -> set[str]:
    """Return the top-level packages that a script imports in a process of its own."""
    code = f"import json, sys; {script}; print(json.dumps(sorted(set(name.partition('.')[0] for name in sys.modules))))"
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return set(json.loads(told.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lazy")
    outcome = launch(*TINY, "measure=[]", f"checkpoint.dir={folder / 'model'}", f"hydra.run.dir={folder / 'run'}")
    assert (outcome.code, outcome.err) == (0, "")
    return folder / "model"


@pytest.mark.parametrize("script", [GENERATE, FROM_PRETRAINED], ids=["load", "from_pretrained"])
def test_a_checkpoint_loads_without_heavy_packages(script, checkpoint):
    imported = _imported(script, str(checkpoint))
    assert {"torch", "transformers", "haq_lab"} <= imported
    assert imported & set(HEAVY) == set()


def test_the_package_and_its_command_import_not_even_torch():
    imported = _imported("import haq_lab, haq_lab.cli.commands")
    assert imported & {"torch", "transformers", "hydra", *HEAVY} == set()
