"""Experts of 4 and of 8 bits in one model: the output is that without offloading, and every byte counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from two_tiers import WINDOWS, FourOrEightBits, TwoTiers, decoded, finished

from haq_lab.hardware.local import hardware
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.offload.costs.measured import measure_costs
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.policies.placement import place
from haq_lab.offload.session import FLOAT, OffloadSession
from haq_lab.offload.settings import Offload
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import ExpertFileWriter
from haq_lab.result_cache.store import Store

LRU = Offload(budget=8, spare=1, eviction="lru", placement="frequency")


@pytest.fixture(scope="module")
def placed() -> TwoTiers:
    torch.set_num_threads(1)
    with torch.no_grad():
        return TwoTiers(CpuBackend(), Streams(), quantizer=FourOrEightBits())


@pytest.mark.parametrize(
    ("rule", "slots", "scope", "spare", "prefetch", "in_place"),
    [
        ("lru", 1, "global", 1, None, False),
        ("lru", 8, "global", 2, "gate", False),
        ("haq", 8, "global", 3, "path", False),
        ("lfu", 9, "layer", 1, None, True),
        ("none", 5, "global", 2, "gate", True),
        ("moe_infinity", 24, "global", 1, None, False),
    ],
)
@torch.no_grad()
def test_no_budget_or_policy_changes_a_bit(placed, tmp_path, rule, slots, scope, spare, prefetch, in_place):
    decide = (lambda hits, missing: list(missing)[::2]) if in_place else None
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        engine, whole = placed.engine(rule, slots, scope, spare, prefetch, decide, writer)
        layouts = engine.slow_tier.layouts
        assert len(layouts.distinct) == 4, "gate and up have 4 or 8 bits, and so has down"
        start = engine.policy.resident.copy()
        try:
            assert torch.equal(placed.generate(whole), placed.expected)
            engine.check()
            spares = spare * sum(layout.size for layout in layouts.distinct)
            assert engine.stats()["offload.fast_tier_bytes"] == layouts.sizes[start].sum() + spares
            assert layouts.sizes[engine.policy.resident].sum() == layouts.sizes[start].sum()
        finally:
            engine.close()


def plain_reads(trace, resident, layouts):
    """Count the reads of each expert by LRU as one would write it down. A prompt is one visit."""
    held, used, reads, clock = set(zip(*np.nonzero(resident), strict=True)), Counter(), Counter(), 0
    steps = [np.arange(trace.tokens)[~trace.decode], *np.flatnonzero(trace.decode)[:, None]]
    for tokens in steps:
        for layer in range(trace.layers):
            wanted, clock = [(layer, int(one)) for one in np.unique(trace.experts[tokens, layer])], clock + 1
            missing = [key for key in wanted if key not in held]
            reads.update(missing)
            for key in wanted:
                used[key] = clock
            for key in missing if len(wanted) <= len(held) else []:
                others = [one for one in held if one not in wanted and layouts.index[one] == layouts.index[key]]
                if others:
                    held.remove(min(others, key=lambda one: (used[one], one)))
                    held.add(key)
    return reads


@torch.no_grad()
def test_the_bytes_moved_are_those_of_a_reference_simulation(model, tmp_path):
    session = OffloadSession(LRU, hardware("rtx3060_12g"), model, tmp_path, Store())
    layers = finished(model, session.add, FourOrEightBits())
    session.find_profile(None, WINDOWS, "random")
    session.engage(layers)
    engine = session.engine
    start, layouts = engine.policy.resident.copy(), engine.slow_tier.layouts
    decoded(model.assemble(layers))
    reads = np.zeros(start.shape, np.int64)
    for key, count in plain_reads(engine.recorder.trace(), start, layouts).items():
        reads[key] = count
    assert len(set(layouts.sizes[reads > 0])) > 1
    np.testing.assert_array_equal(engine.counters.bytes_moved, reads * layouts.sizes)
    np.testing.assert_array_equal(engine.counters.misses > 0, reads > 0)
    simulated = session.simulated("card")["simulated.card.offload.bytes_moved"]
    weights = reads * layouts.sizes / layouts.sizes.mean()  # in experts of mean size
    assert simulated == pytest.approx(
        weights.sum() * min(layouts.sizes.mean(), Shape.of(model.config).expert), rel=1e-3
    )
    session.close()


@torch.no_grad()
def test_a_budget_in_bytes_is_used_by_the_bytes_of_each_expert(model, tmp_path):
    shape = Shape.of(model.config)
    reserved = FLOAT * 16 * (shape.kv_per_token + shape.work_per_token)
    for number, budget in enumerate((reserved + 150_000, reserved + 200_000)):
        settings = replace(LRU, budget=f"{budget}B", kv_tokens=16)
        session = OffloadSession(settings, None, model, tmp_path / str(number), Store())
        layers = finished(model, session.add, FourOrEightBits())
        session.find_profile(None, WINDOWS, "random")
        session.engage(layers)
        engine = session.engine
        layouts, slots = engine.slow_tier.layouts, engine.policy.slots
        spares = sum(layout.size for layout in layouts.distinct)
        assert engine.arena.bytes == layouts.sizes[engine.policy.resident].sum() + spares <= budget - reserved
        more = place("frequency", session._profile, slots + 1)
        assert layouts.sizes[more].sum() + spares > budget - reserved, "the next expert does not fit"
        assert layouts.sizes[engine.policy.resident].sum() < slots * layouts.largest, "slots have the experts' sizes"
        decoded(model.assemble(layers))
        engine.check()
        session.close()


@torch.no_grad()
def test_experts_that_are_converted_have_one_size_on_the_device(model, tmp_path):
    outputs = []
    for number, budget in enumerate(("100%", 5)):
        settings = replace(LRU, budget=budget, device_format="fp16")
        session = OffloadSession(settings, None, model, tmp_path / str(number), Store())
        layers = finished(model, session.add, FourOrEightBits())
        session.find_profile(None, WINDOWS, "random")
        session.engage(layers)
        outputs.append(decoded(model.assemble(layers)))
        tier = session.engine.slow_tier
        assert len(tier.layouts.distinct) == 1
        assert len(np.unique(tier.moved_bytes)) > 1, "as many bytes are moved as an expert has in its own bits"
        session.close()
    assert torch.equal(*outputs)


@torch.no_grad()
def test_costs_are_measured_on_an_expert_of_typical_size(model, tmp_path):
    layers = finished(model, quantizer=FourOrEightBits())
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        for layer in finished(model, quantizer=FourOrEightBits()):
            writer.add(layer.mlp.experts)
        tier = writer.open()
    costs = measure_costs(layers[0], model.family.moe, tier, model)
    assert costs.expert_bytes == round(tier.moved_bytes.mean())
    assert set(costs.fetch.sizes) == set(tier.moved_bytes[0])
    assert [costs.bytes_of(1, number) for number in range(8)] == tier.moved_bytes[1].tolist()
    tier.close()
