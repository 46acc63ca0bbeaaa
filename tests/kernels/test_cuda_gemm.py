"""Test the benchmark experiments/benchmarks/cuda_gemm.py without a GPU: what it compares, captures and counts."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from haq_lab.hardware.spec import load_hardware
from haq_lab.int8.cuda.kernels import Kernels

SOURCE = Path(__file__).parents[2] / "experiments" / "benchmarks" / "cuda_gemm.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("cuda_gemm", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def replays(monkeypatch):
    """Replace CUDA graphs and events by fakes whose every replay takes 40 ms. Returns the number of replays."""
    replays, stream = [0], SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def block(*of):
        yield

    def replay():
        replays[0] += 1

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 40.0)
    fakes = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": block,
        "graph": block,
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "Event": lambda enable_timing: event,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return replays


@pytest.mark.parametrize(("m", "names"), [(3, 3), (16, 3), (17, 4)])
def test_only_products_with_the_same_output_are_compared(host: Kernels, benchmark, m, names):
    calls = benchmark.products(m, 24, 32, host, torch.device("cpu"), weights=2)
    assert len(calls) == names
    outputs = {name: call(1) for name, call in calls.items()}
    assert {tuple(output.shape) for output in outputs.values()} == {(m, 24)}
    assert all(output.dtype == (torch.int32 if "sums" in name else torch.float16) for name, output in outputs.items())
    if names == 4:
        assert torch.equal(outputs["sums.ours"], outputs["sums.int_mm"])


def test_a_graph_has_twenty_calls_with_different_weights(benchmark, replays):
    numbers: list[int] = []
    assert benchmark.median_seconds(numbers.append, repeats=5) == pytest.approx(0.040 / 20)
    assert numbers == [0, *range(20)], "one to warm up, then those in the graph"
    assert replays == [3 + 5]


def test_rates_count_useful_operations(benchmark, replays, host, monkeypatch):
    """Every call takes 2 ms. The RTX 4090 computes 660.6 TOPS and reads 1,008 GB/s (conf/hardware/rtx4090.yaml)."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(benchmark.cuda_device, "kernels", lambda: None)
    monkeypatch.setattr(
        benchmark, "products", lambda *shape: {"sums.ours": abs, "sums.int_mm": abs, "linear.ours": abs}
    )
    row = benchmark.measure(17, 4096, 4096, load_hardware("rtx4090"), repeats=1)
    assert row["sums.ours_ms"] == row["sums.int_mm_ms"] == pytest.approx(2.0)
    assert row["sums.ours_tops"] == pytest.approx(2 * 17 * 4096 * 4096 / 2e-3 / 1e12)
    read = 17 * 4096 + 4096 * 4096
    assert row["sums.ours_of_roofline"] == pytest.approx((read + 4 * 17 * 4096) / 1008e9 / 2e-3)
    assert row["linear.ours_of_roofline"] == pytest.approx((read + 2 * 17 * 4096 + 4 * (17 + 4096)) / 1008e9 / 2e-3)
    assert "sums.int_mm_of_roofline" not in row
