"""Test which packages setup.sh installs for a driver. A script replaces `nvidia-smi`."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def decision(tmp_path: Path, nvidia_smi: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `setup.sh --print` with only a fake `nvidia-smi` in PATH, or nothing if it is None."""
    if nvidia_smi is not None:
        fake = tmp_path / "nvidia-smi"
        fake.write_text(f"#!{shutil.which('sh')}\n{nvidia_smi}\n")
        fake.chmod(0o755)
    command = [shutil.which("bash"), "setup.sh", "--print", *arguments]
    environment = {"PATH": str(tmp_path)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("driver", "torch", "extra"),
    [
        ("615.10", "torch>=2.11", "cuda13"),
        ("580.65.06", "torch>=2.11", "cuda13"),
        ("579.99", "torch==2.10.*", "cuda12"),
        ("550.54.15\n550.54.15", "torch==2.10.*", "cuda12"),  # two GPUs
        ("525.60.13", "torch==2.10.*", "cuda12"),
    ],
)
def test_the_driver_decides(tmp_path, driver, torch, extra):
    answer = f'[ "$*" = "--query-gpu=driver_version --format=csv,noheader" ] && echo "{driver}"'
    assert decision(tmp_path, answer).stdout.split("\n") == [torch, f".[{extra}]", ""]
    assert decision(tmp_path, answer, "python3", "dev").stdout.split("\n") == [torch, f".[dev,{extra}]", ""]


@pytest.mark.parametrize(
    "answer",
    [None, "echo NVIDIA-SMI has failed; exit 9", "echo No devices were found"],
)
def test_without_a_gpu_no_cuda_packages_are_added(tmp_path, answer):
    done = decision(tmp_path, answer, "python3", "dev")
    assert (done.stdout, done.stderr) == (".[dev]\n", "")
    assert decision(tmp_path, answer).stdout == ".\n"


def test_a_driver_that_is_too_old_is_named(tmp_path):
    done = decision(tmp_path, "echo 470.256.02", "python3", "dev")
    assert done.stdout == ".[dev]\n"
    assert done.stderr.count("\n") == 1
    assert "NVIDIA driver 470.256.02 is too old for the wheel cupy-cuda12x" in done.stderr
    assert "525" in done.stderr


def test_the_extras_fit_the_torch_that_is_chosen():
    """torch 2.10 pins NVRTC 12.8.93 and torch 2.11 pins 13.0.88, so neither an extra nor `dev` may exclude them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {"nvidia-cuda-nvrtc-cu12": "12.8.93", "nvidia-cuda-nvrtc": "13.0.88"}
    for extra, oldest, older in (("cuda12", "2.10.0", "2.9.1"), ("cuda13", "2.11.0", "2.10.0")):
        (torch,) = [one for one in map(Requirement, extras[extra]) if one.name == "torch"]
        assert torch.specifier.contains(oldest)
        assert not torch.specifier.contains(older), "its streams lack __cuda_stream__, or it is built for CUDA 12"
    for requirement in map(Requirement, [*extras["cuda12"], *extras["cuda13"], *extras["dev"]]):
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name])
