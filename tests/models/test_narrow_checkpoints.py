"""Checkpoints whose weights are in float8 or MXFP4 are read as the floats they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.preflight import measure_size
from haq_lab.storage.narrow_floats import widen_mxfp4
from haq_lab.utils.errors import UserError
from tests.models.test_layerwise import whole_of

BLOCK = 24  # does not divide the widths


def copied(source: Path, folder: Path, change, quantization: dict | None = None) -> Path:
    """Return a copy of a checkpoint whose tensors `change` returns, with a `quantization_config`."""
    shutil.copytree(source, folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    if quantization is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and "proj" in name


def float8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight (n, k) to float8 with a scale for each block."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scales = torch.empty(rows, columns)
    levels = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            part = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            scales[row, column] = weight[part].abs().max() / 448
            levels[part] = weight[part] / scales[row, column]
    return levels.to(torch.float8_e4m3fn), scales


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
def test_float8_with_scales_of_blocks(architecture, tmp_path, windows, logits_of):
    """As DeepSeek-V3's own checkpoint, whose experts have one tensor for each linear."""
    source = TinyModel(architecture).folder()
    wide = {}

    def narrow(tensors):
        stored = {}
        for name, tensor in tensors.items():
            if not is_linear(name, tensor):
                stored[name] = wide[name] = tensor
                continue
            levels, scales = float8_blocks(tensor)
            stored[name], stored[f"{name}_scale_inv"] = levels, scales
            factor = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            wide[name] = levels.float() * factor[: tensor.shape[0], : tensor.shape[1]]
        return stored

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    model = LayeredModel(copied(source, tmp_path / "narrow", narrow, config))
    expected = whole_of(copied(source, tmp_path / "wide", lambda tensors: wide))(windows).logits
    layers = [model.load_layer(index) for index in range(model.depth)]
    torch.testing.assert_close(logits_of(model, layers, windows), expected, rtol=1e-5, atol=1e-4)
    assert not hasattr(model.config, "quantization_config")
    assert measure_size(model.config).total > 0


def test_mxfp4_experts_of_gpt_oss(tmp_path, windows, logits_of):
    source = TinyModel("gpt_oss").folder()
    wide = {}

    def narrow(tensors):
        generator, stored = torch.Generator().manual_seed(0), {}
        for name, tensor in tensors.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                stored[name] = wide[name] = tensor
                continue
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
            wide[name] = widen_mxfp4(blocks, scales, torch.float32).contiguous()
        return stored

    model = LayeredModel(copied(source, tmp_path / "narrow", narrow, {"quant_method": "mxfp4"}))
    expected = whole_of(copied(source, tmp_path / "wide", lambda tensors: wide))(windows).logits
    layers = [model.load_layer(index) for index in range(model.depth)]
    torch.testing.assert_close(logits_of(model, layers, windows), expected, rtol=1e-5, atol=1e-4)


def test_damaged_scales_are_refused_by_name(tmp_path):
    def narrow(tensors):
        name = "model.layers.0.mlp.down_proj.weight"
        levels = {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(3, 3)}
        return tensors | levels

    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = LayeredModel(copied(TinyModel("llama").folder(), tmp_path / "narrow", narrow, config))
    with pytest.raises(UserError, match=r"'model.layers.0.mlp.down_proj.weight' in .* is damaged: scales \(3, 3\)"):
        model.load_layer(0)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors, int-quantized"),
        ({"quant_method": "haq_lab"}, "haq_lab"),
    ],
)
def test_integers_are_refused_by_name(quantization, name, tmp_path):
    folder = copied(TinyModel("llama").folder(), tmp_path / "narrow", lambda tensors: tensors, quantization)
    with pytest.raises(UserError, match=f"is already quantised by {name}"):
        LayeredModel(folder)
