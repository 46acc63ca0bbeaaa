"""The cost model counts what the kernels really execute, and its bounds are the ones of the cited figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haq_lab.hardware.spec import cited_hardware, load_hardware
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import LARGE, MEDIUM, SMALL, TILES
from haq_lab.int8.cuda.roofline import (
    Work,
    dequant_work,
    gemm4_work,
    gemm_work,
    gemv4_work,
    gemv_work,
    grouped_work,
    least_seconds,
    quantize_work,
    useful_work,
)
from haq_lab.utils.errors import UserError

from .checks import FOUR_BIT_TILES, check_grouped, check_product, check_product4
from .host import HostRunner

HARDWARE = cited_hardware()
few = settings(max_examples=10, derandomize=True, deadline=None, database=None)


def executed(runner: HostRunner) -> tuple[int, int]:
    """Multiply-adds and bytes copied asynchronously by the last launch."""
    return runner.counted["mma_multiplies"] + runner.counted["dot_multiplies"], runner.counted["async_bytes"]


@few
@given(m=st.integers(1, 150), n=st.integers(1, 150), chunks=st.integers(1, 30), tile=st.sampled_from(TILES))
def test_a_gemm_does_what_the_model_counts(host: Kernels, host_runner: HostRunner, m, n, chunks, tile):
    k = 16 * chunks
    check_product(host, m, n, k, torch.float16, bias=False, seed=0, tile=tile, split=1)
    work = gemm_work(m, n, k, tile)
    asynchronous = work.copied if host_runner.architecture >= 80 else 0
    assert executed(host_runner) == (work.multiplies, asynchronous)


@few
@given(m=st.integers(1, 60), chunks=st.integers(1, 60), split=st.integers(1, 4))
def test_a_split_gemm_does_what_the_model_counts(host: Kernels, host_runner: HostRunner, m, chunks, split):
    check_product(
        host,
        m,
        70,
        16 * chunks,
        torch.float32,
        bias=False,
        seed=0,
        call="accumulate",
        tile=SMALL,
        split=split,
    )
    assert executed(host_runner)[0] == gemm_work(m, 70, 16 * chunks, SMALL, split=split).multiplies


@few
@given(m=st.integers(1, 8), n=st.integers(1, 40), chunks=st.integers(1, 60))
def test_a_gemv_does_what_the_model_counts(host: Kernels, host_runner: HostRunner, m, n, chunks):
    check_product(host, m, n, 16 * chunks, torch.float16, bias=False, seed=0, call="gemv")
    assert executed(host_runner) == (gemv_work(m, n, 16 * chunks).multiplies, 0)


@few
@given(m=st.integers(1, 150), n=st.integers(1, 150), chunks=st.integers(1, 12), tile=st.sampled_from(FOUR_BIT_TILES))
def test_a_4_bit_gemm_does_what_the_model_counts(host: Kernels, host_runner: HostRunner, m, n, chunks, tile):
    k = 32 * chunks
    check_product4(host, m, n, k, torch.float16, group=64, bias=False, seed=0, tile=tile)
    work = gemm4_work(m, n, k, tile, 64)
    asynchronous = work.copied if host_runner.architecture >= 80 else 0
    assert executed(host_runner) == (work.multiplies, asynchronous)


@few
@given(m=st.integers(1, 8), n=st.integers(1, 40), chunks=st.integers(1, 30))
def test_a_4_bit_gemv_does_what_the_model_counts(host: Kernels, host_runner: HostRunner, m, n, chunks):
    check_product4(host, m, n, 32 * chunks, torch.float16, group=64, bias=False, seed=0, call="gemv")
    assert executed(host_runner) == (gemv4_work(m, n, 32 * chunks, 64).multiplies, 0)


@few
@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any),
    tile=st.sampled_from((SMALL, MEDIUM)),
)
def test_a_grouped_product_does_what_the_model_counts(host: Kernels, host_runner: HostRunner, counts, tile):
    check_grouped(host, counts, 70, 208, torch.float16, bias=False, seed=0, tile=tile)
    work = grouped_work(counts, 70, 208, tile)
    asynchronous = work.copied if host_runner.architecture >= 80 else 0
    assert executed(host_runner) == (work.multiplies, asynchronous)


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_has_its_figures_and_their_source(name: str):
    hardware = load_hardware(name)
    assert hardware.int8_tops > 0
    assert hardware.bandwidth_gbs > 0
    assert hardware.memory_gb > 0
    assert "int8" in hardware.source


def test_unknown_hardware_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'rtx4090'"):
        load_hardware("rtx4091")


def test_the_bound_is_the_larger_of_the_two():
    hardware = load_hardware("rtx3090")
    assert least_seconds(Work(142 * 10**9, 0, 1), hardware) == pytest.approx(1e-3)
    assert least_seconds(Work(1, 0, 936 * 10**6), hardware) == pytest.approx(1e-3)


def test_decode_is_bound_by_memory_and_prefill_by_arithmetic():
    hardware = load_hardware("rtx4090")
    decode, prefill = gemv_work(1, 4096, 4096), gemm_work(4096, 4096, 4096, LARGE)
    assert least_seconds(decode, hardware) == decode.memory / (hardware.bandwidth_gbs * 1e9)
    assert least_seconds(prefill, hardware) == 2 * 4096**3 / (hardware.int8_tops * 1e12)


def test_bytes_of_the_calls_that_only_move_data():
    assert quantize_work(2, 64, in_bytes=2).memory == 2 * 64 * 3 + 8
    assert quantize_work(2, 64, in_bytes=2, inputs=2).memory == 2 * 64 * 5 + 8
    assert quantize_work(2, 64, in_bytes=4, channels=2).memory == 2 * 64 * 5 + 8 + 4 * 128
    assert dequant_work(2, 64).memory == 2 * 64 * 3 + 8
    assert grouped_work([0, 3], 64, 128, SMALL).memory == gemm_work(3, 64, 128, SMALL).memory + 12


def test_4_bit_weights_have_half_the_bytes_and_scales_by_group():
    """3 rows of 96 columns in two groups: 144 bytes, 6 scales, 3 values of bias; 2 rows of x and of float16 outputs."""
    memory = 2 * 96 + 144 + 4 * (2 + 6 + 3) + 2 * 2 * 3
    assert gemv4_work(2, 3, 96, 64, bias=True).memory == gemm4_work(2, 3, 96, SMALL, 64, bias=True).memory == memory


def test_useful_work_has_no_padding():
    """A product of 2 x 3 x 16: 96 multiply-adds, 32 + 48 bytes of operands, 6 outputs, 5 scales."""
    assert useful_work(2, 3, 16) == Work(multiplies=96, copied=0, memory=32 + 48 + 6 * 2 + 5 * 4)
    assert useful_work(2, 3, 16, out_bytes=4, scales=False) == Work(multiplies=96, copied=0, memory=32 + 48 + 6 * 4)
    padded = gemm_work(2, 3, 16, SMALL)
    assert padded.multiplies > useful_work(2, 3, 16).multiplies
    assert padded.memory == useful_work(2, 3, 16).memory
