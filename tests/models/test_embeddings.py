"""Embeddings and head keep their stored type, and the results equal those of float32 tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.utils.hugging_face import quiet_transformers

HALVES = [torch.bfloat16, torch.float16]


def stored_as(dtype: torch.dtype, architecture: str, folder: Path) -> LayeredModel:
    """Return a tiny model whose checkpoint is stored in `dtype`."""
    shutil.copytree(TinyModel(architecture).folder(), folder)
    path = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return LayeredModel(folder)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_tables_keep_their_type_and_logits_equal_float32(architecture, dtype, windows, logits_of, tmp_path):
    model = stored_as(dtype, architecture, tmp_path / "model")
    held = {module.weight.dtype for module in model.shell.modules() if isinstance(module, nn.Embedding | nn.Linear)}
    assert held == {dtype}
    layers = [model.load_layer(index) for index in range(model.depth)]
    with quiet_transformers():
        whole = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    wanted = whole(windows).logits
    logits = logits_of(model, layers, windows)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-4)
    last = model.assemble(layers)(windows, logits_to_keep=1).logits
    torch.testing.assert_close(last, wanted[:, -1:], rtol=1e-5, atol=1e-4)


def test_tied_embeddings_stay_one_tensor(tmp_path):
    shell = stored_as(torch.bfloat16, "llama", tmp_path / "model").shell
    assert shell.get_output_embeddings().weight is shell.get_input_embeddings().weight
