"""Test that processes lock GPUs. The tests use two fake GPUs."""

from __future__ import annotations

import gc
import os
import tempfile
from types import SimpleNamespace

import pytest
import torch
from children import in_child, killed

from haq_lab.config.object_specs import ObjectSpec
from haq_lab.int8.cuda import gpu_lock as module
from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.cuda.gpu_lock import GpuLock
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.utils.errors import UserError

CUDA, FIRST, SECOND = torch.device("cuda"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def current(monkeypatch, tmp_path):
    """Replace torch's GPUs by two fake ones. Returns the devices that became torch's current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu-{index}"))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_held", {})
    yield current
    for stack, _ in module._held.values():
        stack.close()


def elsewhere(work) -> None:
    """Run `work` in another process, which has no locks yet."""

    def forget_locks_and_work() -> None:
        module._held, inherited = {}, module._held
        work()
        assert inherited is not None  # collecting them would remove the description of the holder

    assert not killed(in_child(forget_locks_and_work))


def no_wait(seconds: float) -> None:
    raise AssertionError("the GPU must be free")


def test_a_process_keeps_its_gpu_and_others_take_another(current):
    assert GpuLock(CUDA, wait=no_wait).device == FIRST
    assert GpuLock(CUDA, wait=no_wait).device == FIRST
    assert current == [FIRST, FIRST]

    def other() -> None:
        assert GpuLock(CUDA, wait=no_wait).device == SECOND

    elsewhere(other)


def test_a_process_waits_until_a_gpu_is_free(capsys):
    first, second = GpuLock(FIRST), GpuLock(SECOND)
    module._held, held = {}, module._held  # what another process would see
    waited = []

    def later(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            held.pop("gpu-1")[0].close()

    assert GpuLock(CUDA, wait=later).device == SECOND
    assert waited == [1.0, 1.0, 1.0]
    message = capsys.readouterr().err
    assert message.count("Waiting") == 1
    assert message.count(f"process {os.getpid()} on ") == 2, "one for each GPU"
    assert "backend.share=true" in message
    held["gpu-0"][0].close()
    assert (first.device, second.device) == (FIRST, SECOND)


def test_the_holder_is_named_after_the_timeout():
    lock = GpuLock(FIRST)

    def other() -> None:
        waited = []
        message = rf"backend\.lock_timeout: after 2 seconds .*\(process {os.getppid()} on .*backend\.share=true"
        with pytest.raises(UserError, match=message) as caught:
            GpuLock(FIRST, timeout=2, wait=waited.append)
        assert waited == [1.0, 1.0]
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="after 0 seconds"):
            GpuLock(FIRST, timeout=0, wait=no_wait)

    elsewhere(other)
    lock.release()


def test_a_released_gpu_is_free_for_another_process():
    """As if a job of a sweep ended while the process of its worker lives on."""
    one, two = GpuLock(FIRST), GpuLock(FIRST)
    one.release()
    one.release()

    def refused() -> None:
        with pytest.raises(UserError, match="in use"):
            GpuLock(FIRST, timeout=0)

    elsewhere(refused)
    two.release()
    elsewhere(lambda: GpuLock(FIRST, wait=no_wait))
    assert module._held == {}


@pytest.mark.parametrize("ending", ["close", "garbage collection"])
def test_a_backend_releases_its_gpu(monkeypatch, ending):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    idle = Kernels(lambda launch: None, architecture=80, multiprocessors=4, shared_limit=64 * 1024)
    backend, other = CudaBackend("cuda", idle), CudaBackend("cuda", idle)
    assert backend.device == other.device == FIRST
    if ending == "close":
        backend.close()
        other.close()
    else:
        del backend, other
        gc.collect()
    assert module._held == {}


@pytest.mark.parametrize("ending", ["close", "constructor"])
def test_a_gpu_is_released_after_an_error(monkeypatch, ending):
    """After an error of a kernel every CUDA call fails, and on a GPU that is too old there are no kernels."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: ending == "close")
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    monkeypatch.setattr("haq_lab.int8.cuda.device.kernels", fail)
    kernels = Kernels(fail, architecture=80, multiprocessors=4, shared_limit=64 * 1024) if ending == "close" else None
    with pytest.raises(RuntimeError, match="CUDA error"):
        CudaBackend("cuda", kernels).close()
    assert module._held == {}


def test_a_timeout_must_not_be_negative():
    with pytest.raises(UserError, match=r"backend\.lock_timeout: '-1' is not valid\. It must be greater"):
        ObjectSpec("backend", "CudaBackend", CudaBackend, {"lock_timeout": -1}).create()


def test_a_named_gpu_is_reused():
    assert GpuLock(SECOND).device == SECOND
    assert GpuLock(CUDA).device == SECOND, "the process has it already"


def test_a_device_that_does_not_exist_is_returned():
    assert GpuLock(torch.device("cuda", 5)).device == torch.device("cuda", 5)
    assert GpuLock(torch.device("cpu")).device == torch.device("cpu")
    assert module._held == {}
