"""Memory is counted from the storages of the deployed model."""

from __future__ import annotations

import pytest
import torch

from haq_lab.measure import memory
from haq_lab.measure.memory import Memory, peak_rss, reset_peaks


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
    saved = sum(3 * linear.weight.numel() - 4 * len(linear.weight) for linear in linears)
    assert after["memory.weights_bytes"] == before["memory.weights_bytes"] - saved
    assert after["memory.peak_rss_bytes"] > 10 * 2**20
    assert after["memory.peak_device_bytes"] == 0 or torch.cuda.is_available()


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
