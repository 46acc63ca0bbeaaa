"""The router's choices are counted, and stored as a trace file."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from haq_lab.routing.choices import Routing


@pytest.fixture
def routing() -> Routing:
    """Two windows of three tokens, two layers, two of four experts."""
    routing = Routing(4, (0, 1), (2, 3))
    for shift in (0, 1):
        chosen = (torch.tensor([[0, 1], [0, 2], [1, 0], [2, 0], [0, 1], [0, 2]]) + shift) % 4
        routing.add_layer(chosen, torch.tensor([[0.75, 0.25]] * 6))
    return routing


def test_counts_and_table(routing):
    assert routing.counts(0).tolist() == [6, 3, 3, 0]
    assert routing.counts(1).tolist() == [0, 6, 3, 3]
    table = routing.table()
    assert len(table) == 8
    assert table.groupby("layer")["share"].sum().tolist() == [1, 1]
    row = table[(table.layer == 1) & (table.expert == 1)].iloc[0]
    assert (row.tokens, row.share) == (6, 0.5)
    assert row.gate_weight == pytest.approx((4 * 0.75 + 2 * 0.25) / 6)
    assert table[(table.layer == 0) & (table.expert == 3)].iloc[0].gate_weight == 0


def test_file(routing, tmp_path):
    routing.trace("a model", "a text").save(tmp_path / "routing.safetensors")
    with safe_open(tmp_path / "routing.safetensors", "pt") as stored:
        assert stored.metadata() == {"model": "a model", "text": "a text", "experts": "4"}
        assert stored.get_tensor("experts").dtype == torch.uint8
        assert stored.get_tensor("experts").shape == (6, 2, 2)
        assert torch.equal(stored.get_tensor("experts")[:, 1], routing.chosen[1])
        assert stored.get_tensor("weights").dtype == torch.float16
        assert stored.get_tensor("decode").tolist() == [False] * 6
        assert stored.get_tensor("starts").tolist() == [0, 3]
