"""Costs from a GPU's figures: never below what peak rate and bandwidth allow, and in the order that sizes have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig

from haq_lab.help import options
from haq_lab.offload.gpu_costs import BYTES, gpu_costs
from haq_lab.offload.hardware import hardware
from haq_lab.offload.shape import MIXTRAL, Shape

FORMATS = [("int8", "int8"), ("int8", "fp16"), ("bf16", "fp16")]


def test_mixtral_is_what_its_config_says():
    config = MixtralConfig(vocab_size=32000, num_key_value_heads=8)
    assert Shape.of(config, 8) == MIXTRAL
    weights = MIXTRAL.layers * (MIXTRAL.experts * MIXTRAL.expert + MIXTRAL.rest) + 2 * MIXTRAL.outside
    assert weights == pytest.approx(46.7e9, rel=1e-3)


@pytest.mark.parametrize("name", options("hardware"))
@given(tokens=st.integers(1, 2048), formats=st.sampled_from(FORMATS))
def test_no_cost_is_below_its_bound(name, tokens, formats):
    machine, (host, device) = hardware(name), formats
    costs = gpu_costs(machine, MIXTRAL, host, device)
    assert costs.fast(tokens) >= 2 * tokens * MIXTRAL.expert / (machine.int8_tops * 1e12)
    assert costs.fast(tokens) >= BYTES[device] * MIXTRAL.expert / (machine.bandwidth_gbs * 1e9)
    assert costs.slow(tokens) >= BYTES[host] * MIXTRAL.expert / (machine.host_gbs * 1e9)
    assert costs.fetch(costs.expert_bytes) >= costs.expert_bytes / 1e9 / (machine.link_gbs or machine.bandwidth_gbs)
    for curve in (costs.fast, costs.slow, costs.rest, costs.outside):
        assert curve(tokens + 1) >= curve(tokens) * (1 - 1e-12)


def test_wider_formats_cost_more():
    machine = hardware("rtx3060_12g")
    narrow, loaded, wide = (gpu_costs(machine, MIXTRAL, *formats) for formats in FORMATS)
    size = narrow.expert_bytes
    assert narrow.fetch(size) < loaded.fetch(size), "dequantized on load"
    assert loaded.fetch(size) < wide.fetch(wide.expert_bytes), "half the bytes cross the link"
    assert narrow.fast(1) < loaded.fast(1) == wide.fast(1)
