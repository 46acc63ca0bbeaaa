"""Which weight files are read: those of transformers' `from_pretrained`, whatever lies beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from haq_lab.models.sources import TinyModel
from haq_lab.storage.weight_files import weight_files
from haq_lab.utils.errors import UserError


@pytest.fixture(scope="module")
def original() -> Path:
    return TinyModel("llama", layers=1, hidden=32).folder()


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def other_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}


def shard(folder: Path, tensors: dict[str, torch.Tensor], prefix: str = "model") -> None:
    names = sorted(tensors)
    parts = {f"{prefix}-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / f"{prefix}.safetensors.index.json").write_text(json.dumps(index))


def single_beside_others(folder):
    save_file(other_weights(folder), folder / "model_ema.safetensors", metadata={"format": "pt"})
    save_file(other_weights(folder), folder / "zz_step_100.safetensors", metadata={"format": "pt"})


def single_beside_an_older_index(folder):
    shard(folder, other_weights(folder))


def sharded(folder):
    shard(folder, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()


def sharded_beside_another(folder):
    sharded(folder)
    save_file({"lm_head.weight": torch.ones(2)}, folder / "model-00003-of-00002.safetensors")


def pickled_beside_another(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, folder / "pytorch_model_ema.bin")
    (folder / "model.safetensors").unlink()


def named_by_config(folder):
    save_file(other_weights(folder), folder / "chosen.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "chosen.safetensors"}))


def symbolic_links(folder):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "0f3a")
    (folder / "model.safetensors").symlink_to(blobs / "0f3a")


FORMS = [
    single_beside_others,
    single_beside_an_older_index,
    sharded,
    sharded_beside_another,
    pickled_beside_another,
    named_by_config,
    symbolic_links,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_tensors_are_those_that_transformers_loads(form, folder):
    form(folder)
    files = weight_files(folder)
    read: dict[str, torch.Tensor] = {}
    for path in files.read:
        read |= torch.load(path, weights_only=True) if files.pickled else load_file(path)
    wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in read.items():
        assert torch.equal(tensor, wanted[name]), name
    assert {path.name for path in files.read} | {path.name for path in files.unread} >= {
        path.name for path in folder.glob("*.safetensors")
    }


def test_a_variant_is_read_only_if_it_is_asked_for(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert [path.name for path in weight_files(folder, "fp16").read] == ["model.fp16.safetensors"]
    with pytest.raises(UserError, match=r"no weights named model\.safetensors, .* It has model\.fp16\.safetensors"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", 3])
def test_an_index_stays_inside_its_folder(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"lies outside the folder|not a readable index"):
        weight_files(folder)


@given(content=st.one_of(st.binary(max_size=60), st.just(b"[" * 100_000), st.just(b'{"weight_map": 3}')))
def test_any_index_is_read_or_refused(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^model: '.*index\.json' is not a readable index"):
        weight_files(folder)
