"""Test that moving experts never changes the output: any budget, policy and prefetch gives the same bits."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_tiers import TwoTiers

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.offload.costs.cost_model import Costs, PiecewiseLinear
from haq_lab.offload.engine.cost_feedback import CostFeedback
from haq_lab.offload.engine.engine import Engine
from haq_lab.offload.policies.path_model import fit_path_model
from haq_lab.offload.policies.placement import PLACEMENTS, place
from haq_lab.offload.policies.policy import Visit, make_policy
from haq_lab.offload.policies.prefetch import NextGate, NextOnPath
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import ExpertFile, ExpertFileWriter, ReadError, expert_tensors
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN
from haq_lab.routing.record import record_trace

PROMPT = torch.randint(0, 257, (1, 12), generator=torch.Generator().manual_seed(3))


class Case:
    """A tiny Mixtral, quantised or not, its expert file, and its logits with all experts in memory."""

    def __init__(self, folder: Path, quantizer: RTN | None):
        self.model = LayeredModel(TinyModel("mixtral", layers=3).folder())
        windows = torch.randint(0, 257, (2, 64), generator=torch.Generator().manual_seed(1))
        self.profile = record_trace(self.model, windows, "random")
        self.path_model = fit_path_model(self.profile, steps=50)
        self.quantizer = quantizer
        self.path = folder / f"experts-{quantizer is not None}.bin"
        layers = self.layers()
        with ExpertFileWriter(self.path) as writer:
            for layer in layers:
                writer.add(layer.mlp.experts)
            expert_file = writer.open()
        self.layouts = expert_file.layouts
        expert_file.close()
        layers = self.layers()
        if quantizer is None:  # float products depend on the address of a matrix, so use the same arena
            engine_for(self, self.open(), layers, "none", 24)
        self.expected = generate(self.model.assemble(layers))

    def layers(self) -> list:
        layers: list = []
        keep = lambda index, layer: layers.append(layer)  # noqa: E731
        sequential_pass(PassInputs(self.model, self.quantizer, CpuBackend(), None, CalibrationPolicy(), {}), keep)
        return layers

    def open(self) -> ExpertFile:
        return ExpertFile(self.path, self.layouts)


def generate(whole, steps=5):
    """Return the logits of a prompt and of the tokens decoded after it."""
    tokens, cache, logits = PROMPT, None, []
    for _ in range(steps):
        output = whole(tokens, cache=cache, use_cache=True)
        logits.append(output.logits[:, -1])
        tokens, cache = output.logits[:, -1:].argmax(-1), output.cache
    return torch.cat(logits)


@pytest.fixture(scope="module", params=["int8", "float"])
def case(request, tmp_path_factory) -> Case:
    torch.set_num_threads(1)
    with torch.no_grad():
        return Case(tmp_path_factory.mktemp("experts"), RTN() if request.param == "int8" else None)


def engine_for(case, tier, layers, rule="lru", slots=6, placement="frequency", scope="global", spare=2, prefetch=None):
    policy = make_policy(rule, place(placement, case.profile, slots), case.profile, scope, case.path_model)
    guess = {None: None, "path": NextOnPath(case.profile), "gate": NextGate([layer.mlp.gate for layer in layers])}
    engine = Engine(tier, policy, spare, guess[prefetch], guesses=min(2, spare - 1) if prefetch else 0)
    engine.attach(layers, case.model.family.moe)
    return engine


@settings(max_examples=20)
@given(
    rule=st.sampled_from(["none", "lru", "lfu", "moe_infinity", "haq"]),
    slots=st.integers(1, 24),
    placement=st.sampled_from(PLACEMENTS),
    scope=st.sampled_from(["layer", "global"]),
    spare=st.integers(1, 4),
    prefetch=st.sampled_from([None, "path", "gate"]),
    in_place=st.sampled_from([0, 1, 2]),
)
def test_no_budget_or_policy_changes_a_bit(case, rule, slots, placement, scope, spare, prefetch, in_place):
    layers = case.layers()
    engine = engine_for(case, case.open(), layers, rule, slots, placement, scope, spare, prefetch)
    if in_place:
        engine.policy.decide = lambda resident, missing: [e for e in missing if e % 2 < in_place - 1 or e == 0]
    try:
        assert torch.equal(generate(case.model.assemble(layers)), case.expected)
        engine.check()
        stats = engine.stats()
        assert stats["offload.fast_tier_bytes"] == (engine.policy.slots + spare) * engine.slow_tier.layouts.largest
        assert 0 <= stats["offload.hit_rate_pairs"] <= 1
        assert sum(row["misses"] for row in engine.table()) > 0 or slots > 12
    finally:
        engine.close()


@pytest.mark.parametrize("rule", ["lru", "moe_infinity", "haq"])
def test_the_engine_counts_what_a_replay_does(case, rule):
    """Replaying the recorded routing gives the same hits and residents as the engine."""
    layers = case.layers()
    engine = engine_for(case, case.open(), layers, rule, slots=8)
    replayed = make_policy(rule, engine.policy.resident, case.profile, "global", case.path_model)
    whole = case.model.assemble(layers)
    generate(whole), generate(whole)
    trace = engine.recorder.trace()
    assert trace.starts.tolist() == [0, trace.tokens // 2]
    assert trace.decode.tolist() == 2 * ([False] * PROMPT.shape[1] + [True] * 4)
    rates = replayed.replay(trace)
    engine.close()
    np.testing.assert_array_equal(replayed.resident, engine.policy.resident)
    assert rates.pairs == pytest.approx(engine.stats()["offload.hit_rate_pairs"])
    if rule == "moe_infinity":  # it matches the choices of the current sequence, so only of the second
        np.testing.assert_array_equal(engine.policy.state.current, replayed.state.current)


def test_the_weights_are_freed(case):
    layers = case.layers()
    engine = engine_for(case, case.open(), layers, slots=3)
    held = sum(t.nbytes for layer in layers for expert in layer.mlp.experts for t in expert_tensors(expert).values())
    engine.close()
    assert held <= 3 * engine.slow_tier.layouts.largest


def test_measurements_correct_wrong_costs(case):
    """All costs start at 1000 seconds and are realistic after a few tokens."""
    layers, expert_file = case.layers(), case.open()
    curves = [PiecewiseLinear([1, 2], [1000.0, 1000.0]) for _ in range(8)]
    costs = Costs(*curves[:5], expert_file.layouts.largest, *curves[5:], from_disk=True)
    policy = make_policy("none", place("frequency", case.profile, 6), case.profile)
    policy.decide = lambda resident, missing: list(missing)[:1]
    engine = Engine(expert_file, policy, feedback=CostFeedback(costs, "sum", 3))
    engine.attach(layers, case.model.family.moe)
    assert torch.equal(generate(case.model.assemble(layers)), case.expected)
    engine.close()
    assert all(curve(1) < 10 for curve in curves)
    assert engine.stats()["predictor.mape"] > 1, "the first fetches were predicted to take hours"


class Flaky:
    """Makes the first reads fail, by a short read or an error."""

    def __init__(self, expert_file, times, short):
        self.expert_file, self.times, self.short, self.real = expert_file, times, short, expert_file._pread
        expert_file._pread = self

    def __call__(self, view, offset):
        if self.times:
            self.times -= 1
            if self.short:
                return 10
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.real(view, offset)


@pytest.mark.parametrize("short", [True, False])
def test_a_read_that_fails_twice_is_tried_again(case, short):
    layers, expert_file = case.layers(), case.open()
    engine = engine_for(case, expert_file, layers)
    Flaky(expert_file, 2, short)
    assert torch.equal(generate(case.model.assemble(layers)), case.expected)
    engine.close()


@pytest.mark.parametrize("prefetch", [None, "gate"])
@pytest.mark.parametrize("rule", ["none", "lru"])
def test_a_read_that_keeps_failing_names_the_expert_and_leaves_the_arena_whole(case, rule, prefetch):
    layers, expert_file = case.layers(), case.open()
    engine = engine_for(case, expert_file, layers, rule, slots=8, prefetch=prefetch)
    flaky = Flaky(expert_file, 10**6, short=False)
    whole = case.model.assemble(layers)
    with pytest.raises(ReadError, match=r"expert \d of layer \d could not be read"):
        generate(whole)
    flaky.times = 0
    engine.arena.check()
    assert torch.equal(generate(whole), case.expected), "it continues after the disk works again"
    engine.check()
    engine.close()


@pytest.mark.parametrize("in_place", [False, True], ids=["read", "in_place"])
@torch.no_grad()
def test_a_deployed_model_served_from_a_file_has_the_bits_of_one_in_memory(tmp_path, in_place):
    placed = TwoTiers(CpuBackend(), Streams(), steps=4)
    decide = (lambda hits, missing: list(missing)) if in_place else None
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        engine, whole = placed.engine("lru", slots=6, decide=decide, writer=writer)
        try:
            assert torch.equal(placed.generate(whole), placed.expected)
            assert engine.counters.metrics()["offload.hit_rate_pairs"] < 1
            engine.check()
        finally:
            engine.close()


def test_only_experts_guessed_for_this_layer_count_as_hits_in_the_prediction():
    """Experts 1 and 3 are missing in layer 2. Expert 1 was prefetched for it, and expert 3 for another layer."""
    engine = SimpleNamespace(feedback=Mock(), _guessed={(2, 1): None, (1, 3): None})
    visit = Visit(wanted=[0, 1, 3, 4], missing=[1, 3, 4], in_place=[4], replaces={})
    Engine._predict(engine, 2, np.array([5, 6, 7, 8, 9]), visit)
    engine.feedback.predict.assert_called_once_with({0: 5, 1: 6}, {3: 8}, {4: 9})
