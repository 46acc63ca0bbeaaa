"""Test that weights are counted from the storages of the deployed model, and peaks on its device."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from haq_lab.measure import memory
from haq_lab.measure.memory import Memory, peak_rss, reset_peaks
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.quantizers.rtn import RTN
from tests.measure.conftest import study_of


def test_weights_are_counted(full, quantized):
    before, after = Memory()(full), Memory()(quantized)
    parameters = {parameter.data_ptr(): parameter.numel() for parameter in full.whole.parameters()}
    buffers = sum(buffer.nbytes for buffer in full.whole.buffers())
    assert before["memory.weights_bytes"] == 4 * sum(parameters.values()) + buffers
    assert before["memory.weights_fp16_bytes"] == 2 * sum(parameters.values())
    assert after["memory.weights_fp16_bytes"] == before["memory.weights_fp16_bytes"]

    linears = [
        m for m in full.whole.get_submodule(full.model.family.layers).modules() if isinstance(m, torch.nn.Linear)
    ]
    # Two weights to a byte, and a scale for each row.
    saved = sum(3.5 * linear.weight.numel() - 4 * len(linear.weight) for linear in linears)
    assert after["memory.weights_bytes"] == before["memory.weights_bytes"] - saved
    assert after["memory.peak_rss_bytes"] > 10 * 2**20
    assert after["memory.peak_device_bytes"] == 0


def test_the_peak_is_that_of_the_models_gpu(full, monkeypatch):
    """With `backend.device=cuda:1 backend.share=true`, torch's current device is still GPU 0."""
    second, reset = torch.device("cuda", 1), []
    peaks = {None: 7, second: 1234}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: peaks[device])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: reset.append(device))
    monkeypatch.setattr(memory, "weight_bytes", lambda module: 0)
    deployed = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=second)]))
    assert Memory()(replace(full, whole=deployed))["memory.peak_device_bytes"] == 1234
    reset_peaks(second)
    reset_peaks(torch.device("cpu"))
    assert reset == [second]


def test_peak_sees_what_was_let_go():
    reset_peaks()
    before = peak_rss()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert peak_rss() >= before + 32 * 2**20


def test_peak_where_the_system_has_no_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PEAK", tmp_path / "absent")
    monkeypatch.setattr(memory, "RESET", tmp_path / "absent" / "deeper")
    reset_peaks()
    assert peak_rss() == pytest.approx(peak_rss())
    assert peak_rss() > 10 * 2**20


def test_tables_count_as_stored(windows, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TinyModel("mixtral", hidden=256).folder(), folder)
    path = folder / "model.safetensors"
    stored = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(stored, path, metadata={"format": "pt"})
    study = study_of(LayeredModel(folder), RTN(), windows)

    def bytes_of(name: str, tensor: torch.Tensor) -> int:
        if "embed_tokens" in name or "lm_head" in name:
            return 2 * tensor.numel()
        if "norm" in name or ".gate." in name:
            return 4 * tensor.numel()
        return tensor.numel() + 4 * len(tensor)

    expected = sum(bytes_of(name, tensor) for name, tensor in stored.items())
    rotary = sum(buffer.nbytes for name, buffer in study.whole.named_buffers() if "rotary" in name)
    measured = Memory()(study)
    assert measured["memory.weights_bytes"] == expected + rotary
    assert measured["memory.weights_fp16_bytes"] == 2 * sum(tensor.numel() for tensor in stored.values())
    assert measured["memory.weights_bytes"] <= 0.53 * measured["memory.weights_fp16_bytes"]
