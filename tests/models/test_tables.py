"""Embeddings and head stay as stored, and the numbers are those of float32 tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from haq_lab.int8 import native
from haq_lab.models import tables
from haq_lab.models.layered import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.quiet import quiet_transformers

HALVES = [torch.bfloat16, torch.float16]
native_or_not = pytest.mark.parametrize("has_native", [True, False])


def stored_as(dtype: torch.dtype, architecture: str, folder: Path) -> LayeredModel:
    """A tiny model whose checkpoint is in `dtype`."""
    shutil.copytree(TinyModel(architecture).folder(), folder)
    path = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return LayeredModel(folder)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_they_are_held_as_stored_and_the_logits_are_float32s(architecture, dtype, windows, logits_of, tmp_path):
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


def test_tied_ones_stay_one_tensor(tmp_path):
    shell = stored_as(torch.bfloat16, "llama", tmp_path / "model").shell
    assert shell.get_output_embeddings().weight is shell.get_input_embeddings().weight


def head(dtype: torch.dtype) -> tables.Head:
    linear = nn.Linear(48, 200, bias=False, dtype=dtype)
    return tables.Head(linear.requires_grad_(False))


@native_or_not
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 3, tables.NATIVE_ROWS, tables.NATIVE_ROWS + 1])
def test_products_and_gradients_are_those_of_the_widened_table(dtype, rows, has_native, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: has_native)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4 * 48 * 64)  # 64 rows at a time, 8 in the last block
    narrow = head(dtype)
    x = torch.randn(rows, 48)
    with torch.enable_grad():
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, wanted = narrow(ours), theirs @ narrow.weight.float().t()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        got.square().sum().backward()
        wanted.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert narrow(x.view(rows, 1, 48)).shape == (rows, 1, 200)


class Sizes(TorchDispatchMode):
    """Notes the largest float32 tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


@native_or_not
@pytest.mark.parametrize("rows", [1, 40])
def test_the_whole_table_is_never_widened(has_native, rows, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: has_native)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4 * 48 * 64)
    narrow, x = head(torch.bfloat16), torch.randn(rows, 48, requires_grad=True)
    with Sizes() as sizes, torch.enable_grad():
        narrow(x).sum().backward()
    assert x.grad is not None
    assert sizes.largest <= max(200 * rows, 48 * 64) < 200 * 48
