"""Weights that are not finite, and tokenizers that do not fit the embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from haq_lab.checkpoint.model import open_model
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import HubModel, TinyModel
from haq_lab.utils.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TinyModel("llama", layers=1, hidden=32).folder(), tmp_path / "model"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_refused_unless_allowed(name, value, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"'{name}' .* NaN or infinite entries.*model\.allow_nonfinite=true"):
        LayeredModel(folder).load_layer(0)
    model = open_model(HubModel(str(folder), allow_nonfinite=True), ReferenceBackend())
    read = {f"model.layers.0.{key}": tensor for key, tensor in model.load_layer(0).state_dict().items()}
    read |= model.read_outer_tensors()
    assert torch.equal(read[name].nan_to_num(7), tensors[name].nan_to_num(7))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(UserError, match=r"has 257 tokens or more, but the embedding has 200 rows"):
        LayeredModel(folder).tokenizer()


@pytest.mark.parametrize(("padded", "added", "fits"), [(0, 0, True), (0, 1, False), (3, 3, True), (3, 4, False)])
def test_padded_embeddings_and_added_tokens_count(padded, added, fits, folder):
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows, torch.zeros(padded, rows.shape[1])])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 257 + padded}))
    tokenizer = LayeredModel(folder).tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(added)])
    tokenizer.save_pretrained(folder)
    model = LayeredModel(folder)
    windows = torch.tensor([[model.tokenizer().vocab_size + added - 1]])
    if fits:
        assert model.embed(windows).shape == (1, 1, 32)
    else:
        with pytest.raises(UserError, match=f"has {257 + added} tokens or more, .* {257 + padded} rows"):
            model.embed(windows)


@pytest.mark.parametrize("content", ["[", "{}", "[" * 10_000, '{"model": 3}'])
def test_a_damaged_tokenizer_is_refused(content, folder):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"^model: no usable tokenizer in [^\n]*$"):
        LayeredModel(folder).tokenizer()
