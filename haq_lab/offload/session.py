"""Offload the experts of one run: write each finished layer's experts to the slow tier, then build the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor, nn

from haq_lab.hardware.spec import Hardware
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.offload.costs.cost_model import Costs, Predictor
from haq_lab.offload.costs.from_spec import machine_costs
from haq_lab.offload.costs.measured import measure_costs
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.engine.cost_feedback import CostFeedback
from haq_lab.offload.engine.engine import Engine
from haq_lab.offload.policies.eviction_rules import EVICTION_RULES
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import Policy, make_policy
from haq_lab.offload.policies.prefetch import NextGate, NextOnPath, Prefetch
from haq_lab.offload.settings import Offload
from haq_lab.offload.simulate.simulator import Simulator, Timeline
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.conversion import Conversion, ConvertedTier
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import ExpertFileWriter, Layouts
from haq_lab.offload.tiers.disk_reuse import ReusedExpertFile
from haq_lab.offload.tiers.half_experts import half_experts
from haq_lab.offload.tiers.pinned_host import HostWriter
from haq_lab.offload.tiers.writer import TierWriter
from haq_lab.result_cache.store import Store
from haq_lab.routing.cached import routing_trace
from haq_lab.routing.choices import Routing
from haq_lab.routing.statistics import Residency
from haq_lab.routing.trace import Trace
from haq_lab.utils.atomic_files import naming_path
from haq_lab.utils.errors import UserError

FLOAT = 4  # bytes of a number in the KV cache and the workspace


class OffloadSession:
    """The offloading of one run, from its first finished layer to its metrics.

    Args:
        settings: The run's settings of `offload`.
        hardware: The machine whose costs the predictor uses and that is simulated. If None, this machine's costs are
            measured and nothing is simulated.
        model: The model. It must have experts.
        folder: Folder for the file of the slow tier, if the slow tier is a file.
        store: Result cache for the routing trace, if one has to be recorded.
        streams: CUDA streams of the device that computes. If None, the CPU computes.
        reuse: Whether the slow tier's file stays in `folder` and is used again by the next session there.

    Raises:
        UserError: The model has no experts, or `offload.profile` does not fit it.

    Example:
        session = OffloadSession(settings, None, model, folder, store)
        for layer in layers:
            session.add(layer)                     # its experts leave memory
        session.find_profile(None, windows, "python_docs")
        session.engage(layers)                     # the engine serves the experts from now on
        model.assemble(layers)(tokens)
        session.metrics()
        session.close()
    """

    def __init__(
        self,
        settings: Offload,
        hardware: Hardware | None,
        model: LayeredModel,
        folder: Path,
        store: Store,
        streams: Streams | None = None,
        reuse: bool = False,
    ):
        _require_experts(model)
        self.settings, self.hardware, self.model, self.store = settings, hardware, model, store
        self._profile = _open_profile(settings, model)
        self.path = folder / "experts.bin"
        self._streams, self._reuse = streams or Streams(), reuse
        self._writer = self._make_writer()
        self._tier: SlowTier | None = None
        self.engine: Engine | None = None
        self._added = 0  # layers

    def _make_writer(self) -> TierWriter:
        """Return the writer of the slow tier: host memory if the device has its own memory, else a file."""
        if not self._streams.separate_memory:
            return (ReusedExpertFile if self._reuse else ExpertFileWriter)(self.path).__enter__()
        cpu = None if self.settings.on_miss == "fetch" else CpuBackend()  # runs missing experts in the slow tier
        return HostWriter(len(self.model.kinds.moe_layers), self._streams, cpu)

    def add(self, layer: nn.Module) -> None:
        """Write a layer's experts to the slow tier. Its other weights stay in memory, shared experts included.

        Args:
            layer: The next decoder layer, in its final form. It may have no experts.
        """
        moe, self._added = self.model.moe_of(self._added), self._added + 1
        if moe is None:
            return
        experts, formats = cast(nn.ModuleList, layer.get_submodule(moe.experts)), self.settings.formats
        formats.prepare(experts)
        with naming_path(self.path):
            self._writer.add(experts)
        self._last_experts = experts
        if formats.fast_tier_dtype is not None:
            layer.set_submodule(moe.experts, half_experts(experts, formats.fast_tier_dtype))

    def find_profile(self, routing: Routing | None, calibration: Tensor | None, text: str) -> None:
        """Get the routing trace for placement and prediction, unless `offload.profile` names one.

        Call it before the model is deployed, because recording a trace runs the model layer by layer.

        Args:
            routing: The router's choices in the calibration pass, if they were recorded.
            calibration: (n, t) token windows to record a trace on. Needed if there is no other source.
            text: Name of the calibration text.
        """
        if self._profile is None and routing is not None:
            self.use_profile(routing.trace(self.model.folder.name, text))
        if self._profile is None:
            assert calibration is not None
            self._profile = routing_trace(self.store, self.model, calibration, text)

    def use_profile(self, trace: Trace) -> None:
        """Use a routing trace for placement and prediction.

        Args:
            trace: A trace of this model. All its tokens count as decoded, because the engine decodes token by token.
        """
        self._profile = replace(trace, decode=np.ones_like(trace.decode))

    def engage(self, layers: list[nn.Module]) -> None:
        """Build the engine and attach it to the layers.

        Args:
            layers: All decoder layers, deployed.

        Raises:
            UserError: The budget leaves no slot for an expert.
        """
        assert self._profile is not None, "call find_profile first"
        tier: SlowTier = self._writer.open()
        self._tier = tier
        conversions: Sequence[Conversion] | None = self.settings.formats.conversions(self._last_experts, tier.layouts)
        conversions = conversions or self._writer.relayout(self._last_experts)
        if conversions is not None:
            tier = ConvertedTier(tier, conversions, self._streams.device)
        self.engine = build_engine(self.settings, self.model, layers, tier, self._profile, self.hardware, self._streams)
        self._placed = self.engine.policy.resident.copy()

    @property
    def limitation(self) -> str | None:
        """A sentence if a part of the eviction rule is off for a model of this size, else None."""
        return EVICTION_RULES[self.settings.eviction].limitation(len(self.model.kinds.moe_layers), self.model.experts)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Report only the steps within the block by `metrics`, `simulated` and `table`."""
        if self.engine is None:
            yield
            return
        self._placed = self.engine.policy.resident.copy()
        with self.engine.counting():
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the steps within the block out of `metrics`, `simulated` and `table`. They change what is resident."""
        if self.engine is None:
            yield
            return
        with self.engine.aside():
            yield
        if not self.engine.counters.tokens:  # the steps that will be counted start from here
            self._placed = self.engine.policy.resident.copy()

    def metrics(self) -> dict[str, float]:
        """Return the engine's metrics by name, or nothing if there is no engine."""
        return {} if self.engine is None else self.engine.stats()

    def stats(self) -> dict[str, float]:
        """Return what the engine has counted since it was built.

        Returns:
            `hits` and `misses` (choices of an expert by a token), `bytes_moved`, and with prefetching
            `prefetch_accuracy` (the share of prefetched experts that were needed).
        """
        assert self.engine is not None, "call engage first"
        counters = self.engine.counters
        stats = {"hits": counters.hits, "misses": counters.misses, "bytes_moved": counters.bytes_moved}
        totals = {name: float(values.sum()) for name, values in stats.items()}
        if self.engine.prefetch is not None:
            totals["prefetch_accuracy"] = counters.prefetch_accuracy()
        return totals

    def expert_stats(self) -> dict[str, NDArray[np.int64]]:
        """Return the counts of `stats` for each expert.

        Another thread may call this and `stats` while the model runs.

        Returns:
            `hits`, `misses` and `bytes_moved`, each (layers, E).
        """
        assert self.engine is not None, "call engage first"
        counters = self.engine.counters
        return {"hits": counters.hits.copy(), "misses": counters.misses.copy(), "bytes_moved": counters.bytes_moved}

    def residents(self) -> Residency:
        """Return which experts are in the fast tier, (layers, E) bool."""
        assert self.engine is not None, "call engage first"
        return self.engine.policy.resident.copy()

    def simulated(self, label: str) -> dict[str, float]:
        """Simulate the decoded steps on the run's hardware.

        Args:
            label: Name of the hardware in the metrics.

        Returns:
            Metrics that begin with `simulated.<label>.`. Empty without hardware or without decoded tokens.
        """
        if self.engine is None or self.hardware is None or not self.engine.recorder.decoded:
            return {}
        assert self._profile is not None
        assert self._tier is not None
        shape = _shape_of(self.model, self._tier)
        timeline = simulate_engine(self.settings, self.engine, self._placed, self._profile, self.hardware, shape)
        return timeline.metrics(label)

    def table(self) -> pd.DataFrame:
        """Return the engine's counts, one row a layer with experts, with the number of resident experts."""
        rows = [] if self.engine is None else self.engine.table()
        layers = self.model.kinds.moe_layers  # the engine counts only these
        return pd.DataFrame([row | {"layer": layers[row["layer"]]} for row in rows])

    def close(self) -> None:
        """Stop the engine and delete the slow tier, unless its file is reused."""
        if self.engine is not None:
            self.engine.close()
        elif self._tier is not None:  # building the engine failed
            self._streams.drain()
            self._tier.close()
        self._writer.__exit__()
        if not self._reuse:
            self.path.unlink(missing_ok=True)


def build_engine(
    settings: Offload,
    model: LayeredModel,
    layers: list[nn.Module],
    tier: SlowTier,
    profile: Trace,
    hardware: Hardware | None,
    streams: Streams | None = None,
) -> Engine:
    """Build the engine and attach it to the layers.

    Args:
        settings: The run's settings of `offload`.
        model: The model that the layers belong to.
        layers: Decoder layers in their final form.
        tier: Slow tier that holds their experts.
        profile: Calibration trace of this model.
        hardware: The machine whose costs the predictor uses. If None, this machine's costs are measured.
        streams: CUDA streams of the device that computes. If None, the CPU computes.

    Returns:
        The engine, with the placed experts in the fast tier.

    Raises:
        UserError: The budget leaves no slot for an expert.
    """
    moe, shape = model.family.moe, _shape_of(model, tier)
    assert moe is not None
    layers = [layers[index] for index in model.kinds.moe_layers]
    reserved = FLOAT * (shape.kv_per_token + shape.work_per_token) * settings.kv_tokens + tier.staging_bytes
    layouts = tier.layouts

    def placed(count: int) -> Residency:
        return place(settings.placement, profile, count, settings.seed)

    def resident_bytes(count: int) -> int:
        return count * layouts.largest if len(layouts.distinct) == 1 else int(layouts.sizes[placed(count)].sum())

    spare_bytes = settings.spare * sum(layout.size for layout in layouts.distinct)
    slots = settings.parsed_budget.slots(layouts.sizes, resident_bytes, spare_bytes, reserved)
    costs, observer = None, None
    if settings.on_miss == "predict":
        if hardware is None:
            costs = measure_costs(layers[0], moe, tier, model, streams)
        else:
            costs = _costs_on(hardware, settings, shape, tier)
        if costs.from_disk:  # a GPU's costs are not corrected, because the host's clock does not time its kernels
            observer = CostFeedback(costs, settings.objective, shape.layers)
    policy = build_policy(settings, placed(slots), profile, costs, layouts)
    prefetch: Prefetch | None = None
    if settings.prefetch == "next_gate":
        prefetch = NextGate([moe.router_of(layer) for layer in layers])
    elif settings.prefetch == "path":
        prefetch = NextOnPath(profile)
    guesses = min(profile.k, settings.spare - 1) if prefetch is not None else 0
    record = hardware is not None  # for `simulate_engine`
    engine = Engine(tier, policy, settings.spare, prefetch, guesses, observer, streams, record)
    engine.attach(layers, moe)
    return engine


def build_policy(
    settings: Offload, resident: Residency, profile: Trace, costs: Costs | None, layouts: Layouts
) -> Policy:
    """Build the policy that the settings describe.

    Args:
        settings: The run's settings of `offload`.
        resident: (layers, E) bool, the experts that are resident at the start.
        profile: Calibration trace of the model.
        costs: Costs for the predictor. Needed for `on_miss=predict` only.
        layouts: Layouts of the experts. An expert may evict only experts of the same layout, which fit its slot.

    Returns:
        The policy, before its first visit.
    """
    policy = make_policy(settings.eviction, resident, profile, settings.scope, forms=layouts.index)
    if settings.on_miss == "cpu":
        policy.decide = lambda present, missing: list(missing)
    elif settings.on_miss == "predict":
        assert costs is not None
        policy.decide = Predictor(costs, settings.objective).decide
    return policy


def simulate_engine(
    settings: Offload, engine: Engine, resident: Residency, profile: Trace, hardware: Hardware, shape: Shape
) -> Timeline:
    """Simulate an engine's recorded steps on another machine, with the same routing and prefetch guesses.

    Args:
        settings: The run's settings of `offload`.
        engine: The engine, after at least one whole step.
        resident: (layers, E) bool, the experts that were resident before the first step.
        profile: Calibration trace of the model.
        hardware: The machine to simulate.
        shape: Sizes of the model.

    Returns:
        The simulated times.
    """
    costs = _costs_on(hardware, settings, shape, engine.slow_tier)
    policy = build_policy(settings, resident, profile, costs, engine.slow_tier.layouts)
    prefetch = engine.recorder.prefetch() if engine.prefetch is not None else None
    return Simulator(costs, policy, prefetch, engine.guesses, settings.spare).run(engine.recorder.trace())


def _require_experts(model: LayeredModel) -> None:
    if model.family.probed and model.family.moe is None:
        raise UserError(
            f"offload: model.family=generic finds no experts in a '{model.config.model_type}' that it can move. "
            "Choose offload=none, or add a row to haq_lab/models/families."
        )
    if not model.kinds.moe_layers:
        raise UserError(f"offload: a '{model.config.model_type}' has no experts to offload. Choose offload=none.")


def _open_profile(settings: Offload, model: LayeredModel) -> Trace | None:
    """Open the trace that `offload.profile` names, if it names one."""
    if settings.profile is None:
        return None
    try:
        profile = Trace.open(Path(settings.profile).expanduser())
        profile.must_be_of(len(model.kinds.moe_layers), model.experts)
    except UserError as error:
        raise UserError(f"offload.profile: {error}") from error
    return profile


def _shape_of(model: LayeredModel, tier: SlowTier) -> Shape:
    shape = Shape.of(model.config, model.int8_head is not None, model.family)
    # A blob of int8 experts has scales and padding too, which the costs do not count.
    return replace(shape, quantized_bytes=min(1.0, float(tier.moved_bytes.mean()) / shape.expert))


def _costs_on(hardware: Hardware, settings: Offload, shape: Shape, tier: SlowTier) -> Costs:
    """Return the costs of a model on a machine. Each expert is moved with its share of the bytes."""
    costs = machine_costs(hardware, shape, *settings.formats.pair)
    share = tier.moved_bytes / tier.moved_bytes.mean()
    return replace(costs, sizes=np.rint(share * costs.expert_bytes).astype(np.int64))
