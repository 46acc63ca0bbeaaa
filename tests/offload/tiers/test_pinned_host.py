"""Test experts in host memory that run on a device.

On a CPU there is no pinned memory and there are no streams. `pytest -m gpu` runs the same tests on a GPU with both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from two_tiers import DEVICES, TwoTiers, backend_on

from haq_lab.offload.policies.policy import make_policy
from haq_lab.offload.tiers.cuda_streams import Streams, make_streams
from haq_lab.offload.tiers.disk import bind, expert_tensors
from haq_lab.offload.tiers.pinned_host import HostWriter
from haq_lab.utils.errors import UserError

LONG = 20_000_000  # GPU clock cycles, about 10 ms: much longer than an expert of the tiny model


@pytest.fixture(scope="module", params=DEVICES)
def placed(request: pytest.FixtureRequest) -> Iterator[TwoTiers]:
    torch.set_num_threads(1)
    with torch.no_grad():
        backend = backend_on(request.param)
        yield TwoTiers(backend, make_streams(backend.device))


def late(placed: TwoTiers) -> None:
    """Keep the current stream busy for a while. A CPU has none."""
    if placed.streams.separate_memory:
        torch.cuda._sleep(LONG)


@settings(max_examples=8)
@given(
    rule=st.sampled_from(["none", "lru", "lfu", "moe_infinity", "haq"]),
    slots=st.integers(1, 24),
    scope=st.sampled_from(["layer", "global"]),
    spare=st.integers(1, 4),
    prefetch=st.sampled_from([None, "path", "gate"]),
)
def test_no_budget_or_policy_changes_a_bit(placed: TwoTiers, rule, slots, scope, spare, prefetch):
    engine, whole = placed.engine(rule, slots, scope, spare, prefetch)
    try:
        assert torch.equal(placed.generate(whole), placed.expected)
        engine.check()
        held = {tensor.device for tensor in [*whole.parameters(), *whole.buffers()] if tensor.numel()}
        assert held == {placed.streams.device}
        assert all(engine.arena.blob(key).device == placed.streams.device for key in engine.arena.slot_of)
        slots = engine.policy.slots + spare
        assert engine.stats()["offload.fast_tier_bytes"] == slots * engine.slow_tier.layouts.largest
    finally:
        engine.close()


@pytest.mark.parametrize("rule", ["lru", "haq"])
def test_hits_and_misses_are_the_policys(placed: TwoTiers, rule):
    engine, whole = placed.engine(rule, slots=8)
    start = engine.policy.resident.copy()
    placed.generate(whole)
    replayed = make_policy(rule, start, placed.profile, "global", placed.path_model)
    rates, stats = replayed.replay(engine.recorder.trace()), engine.stats()
    engine.close()
    np.testing.assert_array_equal(replayed.resident, engine.policy.resident)
    assert rates.pairs == pytest.approx(stats["offload.hit_rate_pairs"])
    assert 0 < stats["offload.hit_rate_pairs"] < 1
    assert engine.counters.read.sum() == rates.fetched, "one copy, one expert"
    assert stats["offload.waited_s"] > 0


@pytest.mark.parametrize("slow", ["computing", "copying"])
def test_neither_stream_overtakes_the_other(placed: TwoTiers, slow, monkeypatch):
    """With one slot and one spare slot, copies must wait for computing and experts for their copies."""
    engine, whole = placed.engine("lru", slots=1, spare=1)
    owner: Any = engine if slow == "computing" else engine.slow_tier
    real = owner.expert if slow == "computing" else owner.read

    def slowly(*arguments: Any) -> None:
        if slow == "copying":
            late(placed)
        real(*arguments)
        if slow == "computing":
            late(placed)

    monkeypatch.setattr(owner, "expert" if slow == "computing" else "read", slowly)
    assert torch.equal(placed.generate(whole), placed.expected)
    engine.close()


def test_memory_is_pinned_until_the_tier_is_closed(placed: TwoTiers):
    engine, _ = placed.engine()
    tier: Any = engine.slow_tier
    blocks: list[Tensor] = list(tier._blocks)
    assert [block.is_pinned() for block in blocks] == [placed.streams.separate_memory] * placed.depth
    engine.close()
    assert not any(block.is_pinned() for block in blocks)
    assert not tier._blocks


class CountingStreams(Streams):
    """Fake streams that count pinned blocks. The third block cannot be pinned."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def pin(self, memory: Tensor) -> None:
        if len(self.held) == 2:
            raise UserError("no more")
        self.held.append(memory.data_ptr())

    def unpin(self, memory: Tensor) -> None:
        self.held.remove(memory.data_ptr())


def experts(seed: int) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Sequential(nn.Linear(20, 3), nn.Linear(3, 20)) for _ in range(4))


def test_added_experts_can_be_read():
    layers, streams = [experts(0), experts(1)], CountingStreams()
    kept = [[{name: t.clone() for name, t in expert_tensors(one).items()} for one in layer] for layer in layers]
    with HostWriter(2, streams) as writer:
        for layer in layers:
            writer.add(layer)
        assert all(tensor.numel() == 0 for layer in layers for tensor in layer.parameters()), "gone from memory"
        tier = writer.open()
    assert len(streams.held) == 2, "the tier's now"
    layout = tier.layouts.distinct[0]
    blob = torch.empty(layout.size, dtype=torch.uint8)
    for index, number in ((1, 3), (0, 0), (1, 2)):
        tier.read(index, number, blob)
        bind(layers[index][number], layout.parts, blob)
        assert all(
            torch.equal(t, kept[index][number][name]) for name, t in expert_tensors(layers[index][number]).items()
        )
    tier.close()
    assert streams.held == []


def test_a_failed_pin_leaves_nothing_pinned():
    streams = CountingStreams()
    with HostWriter(3, streams) as writer:
        writer.add(experts(0))
        writer.add(experts(1))
        with pytest.raises(UserError, match="no more"):
            writer.add(experts(2))
    assert streams.held == []


def test_too_little_memory_raises_at_the_first_layer(monkeypatch):
    writer = HostWriter(8, Streams())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8 * 4 * 4096 - 1}))
    with pytest.raises(UserError, match=r"need 131,072 bytes .* but 131,071 bytes are free\. Choose backend=cpu"):
        writer.add(experts(0))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8 * 4 * 4096}))
    writer.add(experts(0))
