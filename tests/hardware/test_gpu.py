"""Test the record of a GPU with a script in place of `nvidia-smi`, which answers as for an RTX 4090 or a Jetson."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import TINY, launch

from haq_lab.hardware.gpu import FIELDS, query_gpu, sdpa_kernel
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cuda import cupy_runner
from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.cuda.kernels import Kernels

UUID = "6d2c9f6e-0000-0000-0000-000000000001"
ASKED = (
    "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit"
    f" --format=csv,noheader,nounits --id=GPU-{UUID}"
)
RTX4090 = {
    "driver": "580.65.06",
    "sm_clock_mhz": 210.0,
    "sm_clock_max_mhz": 3105.0,
    "memory_clock_mhz": 405.0,
    "memory_clock_max_mhz": 10501.0,
    "power_limit_w": 450.0,
}
NOTHING = dict.fromkeys(FIELDS)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a script in PATH that replaces `nvidia-smi`."""

    def install(answer: str) -> None:
        fake = tmp_path / "bin" / "nvidia-smi"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!{shutil.which('sh')}\n{answer}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(fake.parent))

    return install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """A backend on the second GPU of a machine, without a GPU."""
    properties = {torch.device("cuda", 1): SimpleNamespace(name="NVIDIA GeForce RTX 4090", uuid=UUID)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="14.0.1"))
    monkeypatch.setattr(cupy_runner, "_compiler", lambda cupy: SimpleNamespace(version=(13, 0)))
    idle = Kernels(lambda launch: None, architecture=89, multiprocessors=128, shared_limit=64 * 1024)
    return CudaBackend("cuda:1", idle, share=True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f'[ "$*" = "{ASKED}" ] && echo "580.65.06, 210, 3105, 405, 10501, 450.00"', RTX4090),
        ('echo "540.4.0, [N/A], [N/A], [Not Supported], [N/A], [N/A]"', NOTHING | {"driver": "540.4.0"}),
        ("echo No devices were found", NOTHING),
        ("echo Unable to determine the device handle; exit 15", NOTHING),
    ],
)
def test_the_answers_of_nvidia_smi_are_parsed(nvidia_smi, answer, expected):
    nvidia_smi(answer)
    assert query_gpu(f"GPU-{UUID}") == expected


def test_without_nvidia_smi_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert query_gpu(f"GPU-{UUID}") == NOTHING


def test_a_backend_describes_its_own_gpu_and_libraries(nvidia_smi, gpu):
    nvidia_smi(f'[ "$*" = "{ASKED}" ] && echo "580.65.06, 210, 3105, 405, 10501, 450.00"')
    versions = {"cuda": "13.0", "cupy": "14.0.1", "nvrtc": "13.0"}
    assert gpu.describe_gpu() == {"name": "NVIDIA GeForce RTX 4090"} | RTX4090 | versions


def test_without_a_gpu_there_is_no_description():
    assert ReferenceBackend().describe_gpu() is None
    idle = Kernels(lambda launch: None, architecture=89, multiprocessors=128, shared_limit=64 * 1024)
    assert CudaBackend("cpu", idle).describe_gpu() is None


def test_the_attention_kernel_is_the_one_that_torch_chooses():
    """On a CPU, flash attention is the only fused kernel, and torch can be forbidden to use it."""
    cpu = torch.device("cpu")
    assert sdpa_kernel(cpu, torch.float32, 4, 64) == "FLASH_ATTENTION"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert sdpa_kernel(cpu, torch.float32, 4, 64) == "MATH"


class OnGpu(ReferenceBackend):
    """A backend that describes a GPU."""

    def describe_gpu(self):
        return {"name": "a GPU"}


def test_a_runs_record_has_the_gpu_or_none(tmp_path):
    target = f"backend._target_={__name__}.OnGpu"
    for folder, more, expected in (
        (tmp_path / "gpu", [target], {"name": "a GPU", "sdpa_kernel": "FLASH_ATTENTION"}),
        (tmp_path / "cpu", [], None),
    ):
        done = launch(*TINY, *more, f"hydra.run.dir={folder}")
        assert done.code == 0, done.err
        assert json.loads((folder / "results.json").read_text())["run"].get("gpu") == expected
