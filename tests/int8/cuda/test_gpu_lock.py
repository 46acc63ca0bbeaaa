"""Processes lock GPUs. The tests use two fake GPUs."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import pytest
import torch
from children import in_child, killed

from haq_lab.int8.cuda import gpu_lock as module
from haq_lab.int8.cuda.gpu_lock import lock_gpu

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu-{index}"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_locks", {})
    yield
    for lock in module._locks.values():
        lock.release()


def test_a_process_keeps_its_gpu_and_others_take_another(capsys):
    assert lock_gpu(CUDA) == torch.device("cuda", 0)
    assert lock_gpu(CUDA) == torch.device("cuda", 0)

    def other() -> None:
        module._locks.clear()
        assert lock_gpu(CUDA) == torch.device("cuda", 1)
        lock, waited = module._locks.pop("gpu-1"), []  # what a third process would see

        def later(seconds: float) -> None:
            waited.append(seconds)
            lock.release()

        assert lock_gpu(CUDA, wait=later) == torch.device("cuda", 1)
        assert waited == [1.0]

    assert not killed(in_child(other))


def test_a_named_gpu_is_waited_for():
    assert lock_gpu(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert lock_gpu(CUDA) == torch.device("cuda", 1), "the one that it has"


def test_a_device_that_does_not_exist_is_returned():
    assert lock_gpu(torch.device("cuda", 5)) == torch.device("cuda", 5)
    assert lock_gpu(torch.device("cpu")) == torch.device("cpu")
