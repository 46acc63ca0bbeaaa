"""Code that comes with a model is never asked for and never run."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from launching import TINY, launch

from haq_lab.models.sources import TinyModel
from haq_lab.utils.paths import PACKAGE

ROOT = PACKAGE.parent


def auto_calls(path: Path) -> list[ast.Call]:
    """The calls `Auto*.from_pretrained` and `Auto*.from_config` of a file."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    attributes = [(call, call.func) for call in calls if isinstance(call.func, ast.Attribute)]
    return [
        call
        for call, function in attributes
        if isinstance(function.value, ast.Name)
        and function.value.id.startswith("Auto")
        and function.attr in ("from_pretrained", "from_config")
    ]


def test_every_call_of_an_auto_class_refuses_remote_code():
    calls = {path: auto_calls(path) for folder in ("haq_lab", "experiments") for path in (ROOT / folder).rglob("*.py")}
    assert sum(map(len, calls.values())) > 8
    for path, own in calls.items():
        for call in own:
            given = {keyword.arg: keyword.value for keyword in call.keywords}.get("trust_remote_code")
            assert isinstance(given, ast.Constant), f"{path}:{call.lineno} says nothing about remote code"
            assert given.value is False, f"{path}:{call.lineno}"


@pytest.mark.parametrize("model_type", ["llama", "their_own"])
def test_a_folder_with_code_runs_none_of_it_and_asks_nothing(model_type, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(TinyModel("llama").folder(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    places = {name: f"theirs.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": places}))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")

    def asked(prompt=""):
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    tiny = [setting for setting in TINY if not setting.startswith("model")]
    outcome = launch(*tiny, "model=hf", f"model.name={folder}", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == (0 if model_type == "llama" else 2), outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "ran").exists()
