"""Test that weights are counted from the storages of the deployed model, and peaks on its device."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from haq_lab.data.windows import Windows
from haq_lab.measure import memory
from haq_lab.measure.base import Study
from haq_lab.measure.memory import Memory, Resident, libraries, peak_rss, reset_peaks, resident
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.quantizers.rtn import RTN
from haq_lab.utils.errors import UserError
from tests.measure.conftest import TEXTS, study_of


def measured(study: Study) -> dict[str, float]:
    """Measure the memory of a study with a prompt of eight tokens."""
    study.prompts = {Memory(prompt_tokens=8): Windows(torch.arange(1, 9)[None], {})}
    return Memory(prompt_tokens=8)(study)


def test_weights_are_counted(full, quantized):
    before, after = measured(full), measured(quantized)
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
    monkeypatch.setattr(memory, "generate_in_turn", lambda models, prompt, count: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    deployed = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=second)]))
    metrics = measured(replace(full, whole=deployed))
    assert metrics["memory.peak_device_bytes"] == metrics["memory.running_device_bytes"] == 1234
    reset_peaks(second)
    reset_peaks(torch.device("cpu"))
    assert reset == [second] * 2


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


def test_running_is_counted_from_the_libraries_and_has_two_parts(full, monkeypatch):
    """The peak lies within the prompt's step, and what was let go before it does not count."""
    at, peaks = iter([Resident(900, 60)]), iter([5000, 1100, 1100])
    monkeypatch.setattr(memory, "resident", lambda: next(at))
    monkeypatch.setattr(memory, "libraries", lambda: Resident(300, 50))
    monkeypatch.setattr(memory, "peak_rss", lambda: next(peaks))
    monkeypatch.setattr(memory, "reset_peaks", lambda device: True)
    found = measured(full)
    assert found["memory.libraries_bytes"] == 350
    assert found["memory.running_bytes"] == 750
    assert found["memory.running_shared_bytes"] == 10
    assert found["memory.running_private_bytes"] == 740
    assert found["memory.peak_rss_bytes"] == 5000


def test_without_a_reset_of_the_peak_running_is_what_is_resident_after_it(full, monkeypatch):
    monkeypatch.setattr(memory, "resident", lambda: Resident(900, 60))
    monkeypatch.setattr(memory, "libraries", lambda: Resident(300, 50))
    monkeypatch.setattr(memory, "peak_rss", lambda: 5000)
    monkeypatch.setattr(memory, "reset_peaks", lambda device: False)
    assert measured(full)["memory.running_bytes"] == 610


def test_the_libraries_are_those_of_the_first_call():
    first = libraries()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert libraries() == first
    assert resident().private >= block.nbytes


def test_the_model_reads_the_prompt_aside(full):
    """The counts of offloading leave the prompt out."""
    log = []

    @contextmanager
    def aside():
        log.append("aside")
        yield
        log.append("back")

    watched = replace(full, whole=full.whole, aside=aside)
    handle = full.whole.register_forward_pre_hook(lambda module, given: log.append(given[0].shape[1]))
    measured(watched)
    handle.remove()
    assert log == ["aside", 8, 1, 1, 1, 1, "back"]


def test_the_prompt_is_the_beginning_of_the_text(full):
    prompts = Memory(prompt_tokens=8).load_prompts(full.model, TEXTS)
    assert prompts.tokens.shape == (1, 8)
    assert prompts.protocol["text"] == "python_docs"
    with pytest.raises(UserError, match=r"^measure.memory.prompt_tokens: 9999 and 4 decoded tokens are more than"):
        Memory(prompt_tokens=9999).load_prompts(full.model, TEXTS)


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
    found = measured(study)
    assert found["memory.weights_bytes"] == expected + rotary
    assert found["memory.weights_fp16_bytes"] == 2 * sum(tensor.numel() for tensor in stored.values())
    assert found["memory.weights_bytes"] <= 0.53 * found["memory.weights_fp16_bytes"]
