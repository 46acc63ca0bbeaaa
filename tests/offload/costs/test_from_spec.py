"""Test that derived costs respect peak rate and bandwidth, and grow with the sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig, OPTConfig

from haq_lab.hardware.local import hardware
from haq_lab.hardware.spec import Hardware, cited_hardware
from haq_lab.offload.costs.from_spec import BYTES, machine_costs
from haq_lab.offload.costs.model_shape import MIXTRAL, Shape
from haq_lab.utils.errors import UserError

FORMATS = [("int8", "int8"), ("int8", "fp16"), ("bf16", "fp16")]


def test_mixtral_is_what_its_config_says():
    config = MixtralConfig(vocab_size=32000, num_key_value_heads=8)
    assert Shape.of(config) == MIXTRAL
    weights = MIXTRAL.layers * (MIXTRAL.experts * MIXTRAL.expert + MIXTRAL.rest) + 2 * MIXTRAL.outside
    assert weights == pytest.approx(46.7e9, rel=1e-3)


def test_a_dense_model_has_no_shape():
    with pytest.raises(UserError, match="'opt' is a dense model"):
        Shape.of(OPTConfig())


@pytest.mark.parametrize("name", cited_hardware())
@given(tokens=st.integers(1, 2048), formats=st.sampled_from(FORMATS))
def test_no_cost_is_below_its_bound(name, tokens, formats):
    machine, (host, device) = hardware(name), formats
    costs = machine_costs(machine, MIXTRAL, host, device)
    assert costs.fast(tokens) >= 2 * tokens * MIXTRAL.expert / (machine.int8_tops * 1e12)
    assert costs.fast(tokens) >= BYTES[device] * MIXTRAL.expert / (machine.bandwidth_gbs * 1e9)
    assert costs.slow(tokens) >= BYTES[host] * MIXTRAL.expert / (machine.host_gbs * 1e9)
    assert costs.fetch(costs.expert_bytes) >= costs.expert_bytes / 1e9 / (machine.link_gbs or machine.bandwidth_gbs)
    for curve in (costs.fast, costs.slow, costs.rest, costs.outside):
        assert curve(tokens + 1) >= curve(tokens) * (1 - 1e-12)


def test_wider_formats_cost_more():
    machine = hardware("rtx3060_12g")
    narrow, loaded, wide = (machine_costs(machine, MIXTRAL, *formats) for formats in FORMATS)
    size = narrow.expert_bytes
    assert narrow.fetch(size) < loaded.fetch(size), "dequantized on load"
    assert loaded.fetch(size) < wide.fetch(wide.expert_bytes), "half the bytes cross the link"
    assert narrow.fast(1) < loaded.fast(1) == wide.fast(1)


def test_a_machine_without_a_gpu_reads_from_its_disk():
    """Its figures are measured ones, and an expert in place is read and computed."""
    costs = machine_costs(Hardware("here", 0.2, 10.0, 16.0, 1.5, 10.0, "by hand", from_disk=True), MIXTRAL)
    read = costs.expert_bytes / 1.5e9
    assert costs.fetch(costs.expert_bytes) == pytest.approx(read, rel=1e-3)
    assert costs.slow(8) == pytest.approx(read + costs.fast(8))
    assert costs.fast(64) == pytest.approx(2 * 64 * MIXTRAL.expert / 0.2e12, rel=1e-3)
    assert costs.from_disk


def test_a_fetch_reaches_82_percent_of_the_link():
    """Pinned copies reach 80 to 85 % of PCIe's nominal rate."""
    machine = hardware("rtx3060_12g")
    costs = machine_costs(machine, MIXTRAL)
    assert costs.fetch(costs.expert_bytes) == pytest.approx(
        costs.expert_bytes / (0.82 * machine.link_gbs * 1e9) + 30e-6
    )
