"""The .cu sources, unchanged, run on this CPU: bit-exact on drawn shapes and under every schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import LARGE, MEDIUM, SMALL, TILES

from .checks import (
    FLOATS,
    FOUR_BIT_TILES,
    check_dequant,
    check_grouped,
    check_grouped4,
    check_product,
    check_product4,
    check_quantize,
)
from .host import SCHEDULES, HostRunner, Schedule

SIXTEEN = st.integers(1, 26).map(lambda chunks: 16 * chunks)  # K: below, at and between multiples of a step
BLOCKS = st.integers(1, 20).map(lambda blocks: 32 * blocks)  # the same for 4-bit weights
GROUPS = st.sampled_from([32, 64, 128, 10**6])  # the last one is a whole row
DTYPES = st.sampled_from(FLOATS)
SEEDS = st.integers(0, 2**31)
few = settings(max_examples=15, derandomize=True, deadline=None, database=None)


@pytest.fixture(autouse=True)
def _any_schedule(host_runner: HostRunner) -> None:
    host_runner.schedule = Schedule()


@few
@given(data=st.data(), seed=SEEDS, schedule=st.sampled_from(SCHEDULES))
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_gemm(host: Kernels, host_runner: HostRunner, tile, data, seed, schedule):
    host_runner.schedule = schedule
    m, n = data.draw(st.integers(1, tile.rows + 20)), data.draw(st.integers(1, tile.columns + 20))
    k, bias, split = data.draw(SIXTEEN), data.draw(st.booleans()), data.draw(st.integers(1, 3))
    check_product(host, m, n, k, data.draw(DTYPES), bias=bias, seed=seed, tile=tile, split=split)


@few
@given(m=st.integers(1, 80), n=st.integers(1, 80), k=SIXTEEN, split=st.integers(1, 3), seed=SEEDS)
def test_accumulate(host: Kernels, m, n, k, split, seed):
    check_product(host, m, n, k, torch.float32, bias=False, seed=seed, call="accumulate", tile=MEDIUM, split=split)


@pytest.mark.every(3)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.order}-{s.copies}")
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_every_schedule_gives_the_same_bits(host: Kernels, host_runner: HostRunner, tile, schedule):
    host_runner.schedule = schedule
    check_product(host, tile.rows + 3, tile.columns + 5, 464, torch.float32, bias=True, seed=1, tile=tile, split=1)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_shared_memory_has_no_bank_conflicts(host: Kernels, host_runner: HostRunner, tile):
    check_product(host, tile.rows, tile.columns, 192, torch.float32, bias=False, seed=2, tile=tile, split=1)
    assert host_runner.counted["matrix_loads"] > 0
    assert host_runner.counted["bank_conflicts"] == 0


@pytest.mark.parametrize("tile", FOUR_BIT_TILES, ids=lambda tile: tile.name)
def test_packed_weights_in_shared_memory_have_no_bank_conflicts(host: Kernels, host_runner: HostRunner, tile):
    check_product4(host, tile.rows, tile.columns, 192, torch.float32, group=64, bias=False, seed=2, tile=tile)
    assert host_runner.counted["matrix_loads"] > 0
    assert host_runner.counted["bank_conflicts"] == 0


@few
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 40),
    chunks=st.integers(1, 80),
    dtype=DTYPES,
    bias=st.booleans(),
    seed=SEEDS,
)
def test_gemv(host: Kernels, m, n, chunks, dtype, bias, seed):
    check_product(host, m, n, 16 * chunks, dtype, bias=bias, seed=seed, call="gemv")


@few
@given(data=st.data(), seed=SEEDS, schedule=st.sampled_from(SCHEDULES))
@pytest.mark.parametrize("tile", FOUR_BIT_TILES, ids=lambda tile: tile.name)
def test_gemm_with_4_bit_weights(host: Kernels, host_runner: HostRunner, tile, data, seed, schedule):
    host_runner.schedule = schedule
    m, n = data.draw(st.integers(1, tile.rows + 20)), data.draw(st.integers(1, tile.columns + 20))
    k, group, bias = data.draw(BLOCKS), data.draw(GROUPS), data.draw(st.booleans())
    check_product4(host, m, n, k, data.draw(DTYPES), group=group, bias=bias, seed=seed, tile=tile)


@few
@given(m=st.integers(1, 8), n=st.integers(1, 40), k=BLOCKS, group=GROUPS, dtype=DTYPES, bias=st.booleans(), seed=SEEDS)
def test_gemv_with_4_bit_weights(host: Kernels, m, n, k, group, dtype, bias, seed):
    check_product4(host, m, n, k, dtype, group=group, bias=bias, seed=seed, call="gemv")


@few
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    n=st.integers(1, 90),
    k=BLOCKS,
    group=GROUPS,
    dtype=DTYPES,
    bias=st.booleans(),
    seed=SEEDS,
    tile=st.sampled_from(FOUR_BIT_TILES),
)
def test_grouped_with_4_bit_weights(host: Kernels, counts, n, k, group, dtype, bias, seed, tile):
    check_grouped4(host, counts, n, k, dtype, group=group, bias=bias, seed=seed, tile=tile)


@few
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    n=st.integers(1, 90),
    k=SIXTEEN,
    dtype=DTYPES,
    bias=st.booleans(),
    seed=SEEDS,
    tile=st.sampled_from((SMALL, MEDIUM)),
)
def test_grouped(host: Kernels, counts, n, k, dtype, bias, seed, tile):
    check_grouped(host, counts, n, k, dtype, bias=bias, seed=seed, tile=tile)


def test_grouped_with_large_tiles_and_more_experts_than_a_warp_has_lanes(host: Kernels):
    check_grouped(host, [0, 130, 3], 140, 80, torch.float16, bias=True, seed=3, tile=LARGE)
    counts = [0] * 31 + [5, 0, 17] + [0] * 30 + [1, 2, 0]
    check_grouped(host, counts, 30, 48, torch.float16, bias=True, seed=4, tile=SMALL)


@few
@given(m=st.integers(1, 5), chunks=st.integers(1, 140), dtype=DTYPES, static=st.booleans(), seed=SEEDS)
@pytest.mark.parametrize("kind", ["plain", "rmsnorm", "layernorm", "swiglu"])
def test_quantize(host: Kernels, kind, m, chunks, dtype, static, seed):
    check_quantize(host, kind, m, 16 * chunks, dtype, static=static, seed=seed)


@pytest.mark.parametrize("kind", ["plain", "rmsnorm", "layernorm", "swiglu"])
def test_quantize_of_a_row_longer_than_shared_memory(host_runner: HostRunner, kind):
    small = Kernels(host_runner, architecture=80, multiprocessors=4, shared_limit=128 + 32 * 150)
    check_quantize(small, kind, 3, 2512, torch.float16, static=False, seed=5)


@few
@given(
    m=st.integers(1, 3),
    log_block=st.integers(1, 11),
    blocks=st.integers(1, 5),
    dtype=DTYPES,
    static=st.booleans(),
    seed=SEEDS,
)
@pytest.mark.parametrize("kind", ["plain", "rmsnorm", "layernorm", "swiglu"])
def test_quantize_with_a_rotation(host: Kernels, kind, m, log_block, blocks, dtype, static, seed):
    block = 2**log_block
    k = max(block, 16) * blocks
    check_quantize(host, kind, m, k, dtype, static=static, seed=seed, rotation=block)


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("kind", ["plain", "rmsnorm", "layernorm", "swiglu"])
def test_a_rotated_row_longer_than_shared_memory(host_runner: HostRunner, kind, block):
    small = Kernels(host_runner, architecture=80, multiprocessors=4, shared_limit=128 + 32 * 150)
    check_quantize(small, kind, 3, 2560, torch.float16, static=False, seed=5, rotation=block)
    assert not small.can_rotate(2560, 512)
    assert small.can_rotate(1024, 512)
    with pytest.raises(ValueError, match="cannot rotate 2560 columns in blocks of 512"):
        small.quantize_rows(torch.ones(1, 2560), 512)


@few
@given(n=st.integers(1, 6), chunks=st.integers(1, 300), dtype=st.sampled_from(FLOATS[:2]), seed=SEEDS)
def test_dequant(host: Kernels, n, chunks, dtype, seed):
    check_dequant(host, n, 16 * chunks, dtype, seed=seed)


def test_values_that_are_not_finite_still_give_defined_int8(host: Kernels):
    x = torch.tensor([[float("nan"), float("inf"), -1.0, 2.0] * 4], dtype=torch.float16)
    q, _ = host.quantize_rows(x)
    assert ((q >= -127) & (q <= 127)).all()
