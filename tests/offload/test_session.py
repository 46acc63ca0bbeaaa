"""A run's offloading from its settings to its record: profiles are checked first, hardware is simulated, files go."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from two_tiers import WINDOWS, SeparateMemoryStreams, decoded, finished

from haq_lab.hardware.local import hardware
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.offload.costs.from_spec import machine_costs
from haq_lab.offload.costs.measured import TOKENS, UNKNOWN, measure_costs
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.policies.placement import place
from haq_lab.offload.session import OffloadSession, simulate_engine
from haq_lab.offload.settings import Offload
from haq_lab.offload.tiers.disk import ExpertFileWriter, expert_tensors
from haq_lab.offload.tiers.half_experts import ExpertLinear
from haq_lab.quantizers.rtn import RTN
from haq_lab.result_cache.store import Store
from haq_lab.routing.record import record_trace
from haq_lab.utils.errors import UserError

LRU = Offload(budget="50%", spare=2, eviction="lru")


@torch.no_grad()
def test_4_bit_experts_take_half_the_slot_and_move_half_the_bytes(model, tmp_path):
    found = {}
    for bits, quantizer in ((8, RTN()), (4, RTN(weight_bits=4, group=64))):
        settings = Offload(budget=4, spare=2, eviction="lru")
        session = OffloadSession(settings, hardware("rtx3060_12g"), model, tmp_path / str(bits), Store())
        layers = finished(model, session.add, quantizer)
        session.find_profile(None, WINDOWS, "random")
        session.engage(layers)
        decoded(model.assemble(layers))
        engine = session.engine
        found[bits] = engine.slow_tier.layouts.largest, engine.counters.bytes_moved.sum() / engine.counters.read.sum()
        assert session.simulated("x"), "the simulated link carries the packed bytes"
        session.close()
    (wide, moved), (narrow, moved_narrow) = found[8], found[4]
    assert narrow < 0.65 * wide, "so a budget in bytes holds more experts"
    assert moved_narrow < 0.65 * moved


@pytest.mark.parametrize(
    ("settings", "machine"),
    [
        (Offload(budget="50%", spare=2, on_miss="predict"), None),
        (Offload(budget="50%", spare=2, prefetch="next_gate", eviction="lru", placement="uniform"), "rtx3060_12g"),
        (Offload(budget="50%", spare=2, on_miss="predict", prefetch="path"), "rtx3060_12g"),
    ],
)
@torch.no_grad()
def test_a_session_serves_counts_and_simulates(model, tmp_path, settings, machine):
    profile = hardware(machine) if machine else None
    session = OffloadSession(settings, profile, model, tmp_path, Store())
    layers = finished(model, session.add)
    session.find_profile(None, WINDOWS, "random")
    session.engage(layers)
    decoded(model.assemble(layers))
    metrics = session.metrics()
    assert 0 < metrics["offload.hit_rate_pairs"] < 1
    assert len(session.table()) == 2
    told = session.simulated("card")
    if machine is None:
        assert told == {}
        assert math.isfinite(metrics["predictor.mape"])
    else:
        assert "predictor.mape" not in metrics, "a GPU's costs say nothing of this machine"
        assert told["simulated.card.latency.decode_ms_per_token.mean"] > 0
        assert all(name.startswith("simulated.card.") for name in told)
    session.close()
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_steps_aside_are_not_counted(model, tmp_path):
    """Neither before the counted steps nor after them, and the simulation starts from what they leave."""
    settings = Offload(budget="50%", spare=2, on_miss="predict", prefetch="next_gate")
    session = OffloadSession(settings, None, model, tmp_path, Store())
    layers = finished(model, session.add)
    session.find_profile(None, WINDOWS, "random")
    session.engage(layers)
    whole = model.assemble(layers)
    with session.aside():
        decoded(whole)
    assert "offload.hit_rate_pairs" not in session.metrics()
    assert session.engine.recorder.decoded == 0
    assert (session._placed == session.residents()).all()
    with session.counting():
        decoded(whole)
    counted, start = session.metrics(), session._placed.copy()
    with session.aside():
        decoded(whole)
    assert session.metrics() == counted
    assert (session._placed == start).all()
    session.close()


def test_beside_a_device_with_its_own_memory_experts_lie_in_the_hosts(model, tmp_path):
    expected = decoded(model.assemble(finished(model)))
    streams = SeparateMemoryStreams("cpu")
    session = OffloadSession(LRU, None, model, tmp_path, Store(), streams)
    layers = finished(model, session.add)
    assert not list(tmp_path.iterdir()), "no file"
    session.find_profile(None, WINDOWS, "random")
    session.engage(layers)
    assert streams.locked == [8 * session.engine.slow_tier.layouts.largest] * 2
    assert torch.equal(decoded(model.assemble(layers)), expected)
    fetched = streams.copies - session.engine.policy.slots  # without the experts that are resident at the start
    assert session.metrics()["offload.bytes_moved"] == fetched * session.engine.slow_tier.layouts.largest
    assert streams.copies > session.engine.policy.slots
    session.close()
    assert streams.locked == []


@pytest.mark.parametrize(("missing_bytes", "slots"), [(0, 5), (1, 4)])
def test_the_settings_say_what_experts_compute_in(model, tmp_path, missing_bytes, slots):
    shape, card, moved, slot = Shape.of(model.config), hardware("rtx3060_12g"), 5 * 4096, 9 * 4096
    reserved = 4 * 16 * (shape.kv_per_token + shape.work_per_token) + moved  # the expert on its way counts
    budget = f"{reserved + 5 * slot - missing_bytes}B"
    halves = replace(LRU, device_format="fp16", budget=budget, kv_tokens=16)
    session = OffloadSession(halves, card, model, tmp_path, Store())
    layers = finished(model, session.add)
    session.find_profile(None, WINDOWS, "random")
    session.engage(layers)
    decoded(model.assemble(layers))
    engine = session.engine
    assert isinstance(layers[1].mlp.experts[7].down_proj, ExpertLinear)
    assert (engine.slow_tier.moved_bytes == moved).all()
    assert (engine.slow_tier.layouts.sizes == slot).all()
    assert engine.policy.slots == slots - 2
    start = place("frequency", session._profile, engine.policy.slots)
    by_format = [
        simulate_engine(settings, engine, start, session._profile, card, shape).metrics("card")
        for settings in (LRU, halves)
    ]
    name = "simulated.card.latency.decode_ms_per_token.mean"
    assert by_format[0][name] < by_format[1][name], "converting takes time, and floats are read"
    session.close()


def test_a_head_in_int8_costs_what_it_is(tmp_path, monkeypatch):
    model, shapes = LayeredModel(TinyModel("mixtral", layers=2).folder()), []
    model.quantize_head(CpuBackend())

    def costs(hardware, shape, *formats):
        shapes.append(shape)
        return machine_costs(hardware, shape, *formats)

    monkeypatch.setattr("haq_lab.offload.session.machine_costs", costs)
    card = hardware("rtx3060_12g")
    session = OffloadSession(replace(LRU, on_miss="predict"), card, model, tmp_path, Store())
    layers = finished(model, session.add)
    session.find_profile(None, WINDOWS, "random")
    session.engage(layers)
    decoded(model.assemble(layers))
    session.simulated("card")
    session.close()
    assert [shape.head_bytes for shape in shapes] == [1, 1], "as it decides, and as it is simulated"


def test_the_arena_lies_on_the_device_and_the_slow_tier_does_not(model, tmp_path):
    """`meta` stands for a GPU: another device than the CPU, that any machine has."""
    session = OffloadSession(LRU, None, model, tmp_path, Store(), SeparateMemoryStreams("meta"))
    layers = finished(model, session.add)
    session.find_profile(None, WINDOWS, "random")
    session.engage(layers)
    held = {t.device.type for layer in layers for t in expert_tensors(layer.mlp.experts).values() if t.numel()}
    assert held == {"meta"}
    assert session.engine.transfer.streams.copies == session.engine.policy.slots
    blob = torch.zeros(session.engine.slow_tier.layouts.largest, dtype=torch.uint8)
    session.engine.slow_tier.read(0, 0, blob)
    assert blob.any()
    session.close()


@pytest.mark.parametrize("finish", [False, True])
def test_what_is_locked_is_given_up_without_an_engine(model, tmp_path, finish):
    """Where a pass ends early, and where the budget turns out to leave no slot."""
    streams = SeparateMemoryStreams("cpu")
    session = OffloadSession(replace(LRU, budget="1kB"), None, model, tmp_path, Store(), streams)
    layers = finished(model, session.add if finish else lambda layer: None)
    if finish:
        session.find_profile(None, WINDOWS, "random")
        with pytest.raises(UserError, match=r"offload\.budget: it leaves no slot"):
            session.engage(layers)
    else:
        session.add(layers[0])
    assert len(streams.locked) == (2 if finish else 1)
    session.close()
    assert streams.locked == []


def test_a_profile_of_another_model_is_told_before_the_pass(model, tmp_path):
    record_trace(LayeredModel(TinyModel("mixtral", layers=3).folder()), WINDOWS, "random").save(tmp_path / "a.trace")
    for path, message in (("a.trace", "it has 3 layers"), ("none.trace", "there is no file")):
        with pytest.raises(UserError, match=rf"offload\.profile: trace: .*{message}"):
            OffloadSession(Offload(profile=str(tmp_path / path)), None, model, tmp_path, Store())


@torch.no_grad()
def test_costs_are_measured_and_leave_the_layer_as_it_was(model, tmp_path):
    layers = finished(model)
    with ExpertFileWriter(tmp_path / "experts.bin") as writer:
        for layer in finished(model):
            writer.add(layer.mlp.experts)
        store = writer.open()
    before = {name: tensor.clone() for name, tensor in expert_tensors(layers[0].mlp.experts[0]).items()}
    costs = measure_costs(layers[0], model.family.moe, store, model)
    assert costs.expert_bytes == store.layouts.largest
    assert costs.from_disk
    assert list(costs.fast.sizes) == list(costs.slow.sizes) == list(TOKENS)
    assert min(*costs.fast.seconds, *costs.slow.seconds, *costs.fetch.seconds) > 0
    assert costs.rest(1) == costs.outside(1) == costs.issue(1) == UNKNOWN
    after = expert_tensors(layers[0].mlp.experts[0])
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    store.close()


@pytest.mark.parametrize("miss", ["cpu", "predict"])
def test_only_int8_experts_run_on_the_cpu_beside_a_gpu(miss):
    for device, quantized in (("cpu", False), ("cuda", True)):
        Offload(on_miss=miss).must_suit(torch.device(device), quantized)
    with pytest.raises(
        UserError, match=rf"offload\.on_miss: '{miss}' runs experts on the CPU.*Choose offload\.on_miss=fetch"
    ):
        Offload(on_miss=miss).must_suit(torch.device("cuda"), False)
