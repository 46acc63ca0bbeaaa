"""A finished run is shown again only if everything that it read is as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from launching import TINY, launch
from safetensors.torch import load_file, save_file

from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.input_hashes import changed_inputs, input_hashes


@pytest.fixture
def inputs(tmp_path):
    """A model folder, an evaluation text and a calibration text of the user's own."""
    shutil.copytree(TinyModel("llama").folder(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some words to score. " * 60)
    (tmp_path / "calibration.txt").write_text("Other words, which calibrate a model. " * 60)
    return tmp_path


def run(folder, *more):
    settings = ["model=hf", f"model.name={folder / 'model'}", "quantizer=rtn", "quantizer.activations=static"]
    settings += ["data=[text]", f"data.text.path={folder / 'text.txt'}", "data.text.seqlen=64"]
    settings += ["calibration=text", f"calibration.path={folder / 'calibration.txt'}", "calibration.samples=2"]
    tiny = [
        setting for setting in TINY if not setting.startswith(("model", "quantizer", "data", "calibration.samples"))
    ]
    outcome = launch(*tiny, *settings, f"hydra.run.dir={folder / 'run'}", *more)
    assert outcome.code == 0, outcome.err
    metrics = json.loads((folder / "run" / "results.json").read_text())["metrics"]
    return outcome.out, metrics["perplexity.text"]


def finetune(folder):
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.norm.weight"] = torch.linspace(0.5, 2, 64)
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})


def correct_the_config(folder):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.3}))


def edit_the_text(folder):
    (folder / "text.txt").write_text("Quite another text to score. " * 60)


def edit_the_calibration_text(folder):
    (folder / "calibration.txt").write_text("A calibration text of other words. " * 60)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        (finetune, "model.name"),
        (correct_the_config, "model.name"),
        (edit_the_text, "data.text.path"),
        (edit_the_calibration_text, "calibration.path"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_changed_input_runs_again(change, setting, inputs):
    _, before = run(inputs)
    out, again = run(inputs)
    assert "already finished" in out
    assert again == before
    change(inputs)
    out, after = run(inputs)
    assert f"changed since: {setting}; running again" in out
    assert after != before
    assert "already finished" in run(inputs)[0]


def test_a_file_beside_the_weights_that_is_not_read_changes_nothing(inputs):
    config = {"model": {"name": str(inputs / "model")}}
    before = input_hashes(config)
    shutil.copy(inputs / "model" / "model.safetensors", inputs / "model" / "backup.safetensors")
    assert input_hashes(config) == before
    (inputs / "model" / "tokenizer_config.json").write_text("{}")
    assert input_hashes(config) != before


def test_a_relative_path_from_another_folder_is_another_file(tmp_path, monkeypatch):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(name)
    config = {"data": {"text": {"path": "text.txt"}}, "offload": {"_target_": None}, "model": {"name": "org/model"}}
    monkeypatch.chdir(tmp_path / "one")
    recorded = [f"{setting} {digest}" for setting, digest in input_hashes(config).items()]
    assert changed_inputs(recorded, config) == []
    monkeypatch.chdir(tmp_path / "other")
    assert changed_inputs(recorded, config) == ["data.text.path"]
    assert changed_inputs([], config) == [], "a run of an older version has recorded nothing"
