"""Provide quantised checkpoints of tiny models, written once per session by the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launching import TINY, launch
from torch import nn

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear, to_float
from haq_lab.models.experts import Experts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass

STATIC = ["quantizer=haq", "quantizer.activations=static"]


@pytest.fixture(scope="session", params=["tiny_opt", "tiny_llama", "tiny_mixtral"])
def written(request, tmp_path_factory) -> Path:
    """Return a run folder with `checkpoint/` and results."""
    folder = tmp_path_factory.mktemp(request.param)
    where = [f"checkpoint.dir={folder / 'checkpoint'}", f"hydra.run.dir={folder / 'run'}"]
    outcome = launch(*TINY, f"model={request.param}", *STATIC, *where)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(written / "checkpoint", tmp_path / "copy"))


@pytest.fixture
def write(architecture, windows, tmp_path):
    """Return a function that quantises a tiny model and writes its checkpoint."""

    def write(quantizer, model: LayeredModel | None = None) -> Path:
        model = model or LayeredModel(TinyModel(architecture).folder())
        writer = CheckpointWriter(tmp_path / "checkpoint", model, {}, {}, force=False)
        sequential_pass(
            PassInputs(model, quantizer, ReferenceBackend(), windows.flip(0), CalibrationPolicy(), {}),
            lambda *_: None,
            writer,
        )
        writer.finish()
        writer.close()
        return tmp_path / "checkpoint"

    return write


@pytest.fixture
def dequantized():
    """Return a function that changes a layer to our weights in float arithmetic."""

    def dequantize(model: LayeredModel, layer: nn.Module) -> nn.Module:
        for name, module in list(layer.named_modules()):
            if isinstance(module, Int8Linear):
                linear = nn.Linear(module.weight.shape[1], module.weight.shape[0], bias=module.bias is not None)
                linear.weight = nn.Parameter(to_float(module))
                linear.bias = None if module.bias is None else nn.Parameter(module.bias)
                layer.set_submodule(name, linear)
        if model.family.moe_in(dict(layer.named_modules())):
            layer.set_submodule(model.family.moe.experts, Experts(layer.get_submodule(model.family.moe.experts)))
        return layer

    return dequantize
