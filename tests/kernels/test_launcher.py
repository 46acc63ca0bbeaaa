"""The launcher without a GPU: what it refuses, what it passes, and how it chooses."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from haq_lab.int8.cuda import cupy_runner, device
from haq_lab.int8.cuda.cupy_runner import CupyRunner, check_architecture, marshal
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import (
    LARGE,
    MAX_K,
    MEDIUM,
    SMALL,
    STEP,
    Launch,
    choose_split,
    choose_tile,
    k_part,
    padded,
    staged_groups,
)
from haq_lab.int8.cuda.nvrtc import cubin_file
from haq_lab.int8.cuda.sources import module_source
from haq_lab.utils.errors import UserError

from .checks import every_kernel
from .compiled import MAJORS, NEWEST, all_programs, compiler

PARAMETER_KINDS = {"u64": "u8", "b64": "u8", "u32": "i4", "b32": "i4", "s32": "i4", "f32": "f4"}


class Recorder:
    """Keeps launches and runs none."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)


def recorded(name: str) -> list[Launch]:
    """What the check of one kernel launches."""
    recorder = Recorder()
    launcher = Kernels(recorder, architecture=80, multiprocessors=4, shared_limit=64 * 1024)
    with pytest.raises(AssertionError):  # nothing was computed
        every_kernel()[name](launcher, "cpu")
    return recorder.launches


@pytest.mark.parametrize("major", MAJORS)
def test_arguments_have_the_types_that_the_compiled_kernels_declare(major: int):
    programs = all_programs(80, major)
    for name in every_kernel():
        for launch in recorded(name):
            declared = [kind for kind, _ in programs[launch.kernel].parameters]
            passed = [value.dtype.str[1:] for value in marshal(launch.args)]
            assert passed == [PARAMETER_KINDS[kind] for kind in declared], launch.kernel
            assert launch.threads == programs[launch.kernel].limits["maxntid"]


def test_arguments_as_bytes():
    tensor = torch.zeros(4)
    values = marshal((tensor, None, 7, 0.5))
    assert values == (np.uint64(tensor.data_ptr()), np.uint64(0), np.int32(7), np.float32(0.5))
    assert [value.itemsize for value in values] == [8, 8, 4, 4]


class FakeFunction:
    """Stands for a CuPy function."""

    def __init__(self) -> None:
        self.max_dynamic_shared_size_bytes = 48 * 1024
        self.calls: list[tuple] = []

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int) -> None:
        self.calls.append((grid, block, args, shared_mem))


@pytest.mark.parametrize("shared", [1024, 60 * 1024])
def test_the_runner_uses_torchs_stream_and_asks_for_large_shared_memory(monkeypatch, tmp_path, shared):
    function, streams, paths = FakeFunction(), [], []

    def raw_module(path: str) -> SimpleNamespace:
        paths.append(path)
        return SimpleNamespace(get_function=lambda name: function)

    def from_external(stream: cupy_runner.StreamHandle) -> nullcontext:
        streams.append(stream.__cuda_stream__())
        return nullcontext()

    runtime = SimpleNamespace(Device=lambda index: nullcontext(), Stream=SimpleNamespace(from_external=from_external))
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1000 + device))
    runner = CupyRunner(SimpleNamespace(cuda=runtime, RawModule=raw_module), 2, 80, compiler(NEWEST))
    launch = Launch("dequant", "dequant_f16", (3, 1, 1), 128, shared, (None, 5))
    runner(launch)
    runner(launch)
    assert function.calls == [((3, 1, 1), (128, 1, 1), (0, 5), shared)] * 2
    assert streams == [(0, 1002)] * 2
    assert function.max_dynamic_shared_size_bytes == max(shared, 48 * 1024)
    assert len(paths) == 1  # loaded once
    assert paths[0].startswith(str(tmp_path))


def test_cupy_has_what_the_runner_calls():
    """Without a driver nothing can be launched, but the names and the stream protocol are there."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy (`pip install 'haq-lab[cuda13]'`)")
    stream = cupy_runner.StreamHandle(SimpleNamespace(cuda_stream=1234))
    assert cupy.cuda.Stream.from_external(stream).ptr == 1234
    assert hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes")
    assert callable(cupy.RawModule.get_function)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: pytest -m gpu loads every module")
def test_cupy_takes_the_compiled_file_as_far_as_it_can_without_a_driver(tmp_path, monkeypatch):
    """It is the driver that is missing then, not the file."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy (`pip install 'haq-lab[cuda13]'`)")
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path))
    module = cupy.RawModule(path=str(cubin_file("dequant", 80, compiler(NEWEST))))
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaError"):
        module.get_function("dequant_f16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_clear_message():
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU.* Choose backend=cpu"):
        device.kernels()


def test_no_cupy_is_one_clear_message(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs CuPy.*cuda13"):
        cupy_runner.kernels(0)


def test_too_old_a_gpu_is_one_clear_message():
    with pytest.raises(UserError, match=r"7\.5 \(Turing\) or later, but Tesla V100 has 7\.0"):
        check_architecture(70, "Tesla V100")
    check_architecture(75, "T4")


def launcher() -> Kernels:
    return Kernels(Recorder(), architecture=80, multiprocessors=4, shared_limit=64 * 1024)


def int8(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: k.accumulate(int8(2, 24), int8(3, 24)), "K: 24 is not a multiple of 16"),
        (lambda k: k.accumulate(int8(1, MAX_K // 16 * 16 + 16), int8(1, MAX_K // 16 * 16 + 16)), "at most"),
        (lambda k: k.accumulate(int8(2, 32), int8(3, 16)), "qw"),
        (lambda k: k.accumulate(int8(2, 32).float(), int8(3, 32)), r"torch\.float32 is not \(2, 32\) torch\.int8"),
        (lambda k: k.accumulate(int8(32, 2).t(), int8(3, 32)), "contiguous"),
        (lambda k: k.accumulate(int8(33, 16).view(-1)[8:-8].view(32, 16), int8(3, 16)), "aligned"),
        (
            lambda k: k.gemv(int8(9, 16), int8(3, 16), torch.ones(9), torch.ones(3), None, torch.float32),
            "at most 8",
        ),
        (lambda k: k.gemm(int8(2, 16), int8(3, 16), torch.ones(2), torch.ones(4), None, torch.float32), "sw"),
        (lambda k: k.dequant(int8(2, 16), torch.ones(2), torch.float64), r"torch\.float64 is not supported"),
        (lambda k: k.swiglu_quantize(torch.ones(2, 33)), "not an even number"),
        (lambda k: k.quantize_static(torch.ones(2, 32), torch.ones(2)), "scale"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(launcher())


def test_padding_adds_zeros_up_to_a_multiple_of_16():
    x = torch.ones(2, 17)
    assert padded(x).shape == (2, 32)
    assert padded(x).sum() == x.sum()
    assert padded(torch.ones(2, 32)).shape == (2, 32)


def test_nothing_is_launched_for_nothing():
    kernels = launcher()
    assert kernels.gemm(int8(0, 16), int8(3, 16), torch.ones(0), torch.ones(3), None, torch.float32).shape == (0, 3)
    assert kernels.quantize_rows(torch.ones(0, 16))[0].shape == (0, 16)
    assert kernels._run.launches == []


def test_tiles_and_splits_fill_the_gpu():
    assert choose_tile(4096, 4096, 82) == LARGE
    assert choose_tile(256, 1024, 82) == MEDIUM
    assert choose_tile(8, 4096, 82) == SMALL
    assert choose_split(4096, 4096, 4096, LARGE, 82) == 1
    split = choose_split(16, 4096, 14336, SMALL, 82)
    assert split > 1
    assert k_part(14336, split) * split >= 14336
    assert k_part(14336, split) % STEP == 0
    assert choose_split(16, 64, 256, SMALL, 82) == 1  # too little of K to share out


def test_a_row_is_staged_as_far_as_shared_memory_goes():
    assert staged_groups(4096, 48 * 1024) == 512
    assert staged_groups(28672, 99 * 1024) == 3164
    assert 128 + 32 * staged_groups(28672, 99 * 1024) <= 99 * 1024


def test_a_module_is_one_text_with_each_header_once():
    text = module_source("gemm")
    assert '#include "tile.cuh"' not in text
    assert text.count("mma.sync.aligned.m16n8k32") == 1
