"""Offloading within one run: experts leave memory as their layer is finished, an engine serves them afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor, nn

from haq_lab.hardware.spec import Hardware
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.engine.engine import Engine
from haq_lab.offload.settings import Offload, experts_of, refuse_dense
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.conversion import ConvertedTier
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import ExpertFileWriter
from haq_lab.offload.tiers.half_experts import half_experts
from haq_lab.offload.tiers.pinned_host import HostWriter
from haq_lab.offload.tiers.writer import TierWriter
from haq_lab.result_cache.store import Store
from haq_lab.routing.cached import routing_trace
from haq_lab.routing.choices import Routing
from haq_lab.utils.atomic_files import named


class OffloadSession:
    """Args:
    settings: The run's `offload`; a dense model is refused.
    hardware: The run's; what the predictor decides for.
    folder: Where the slow tier lies while the run lasts, if it is a file.
    store: Where a trace is kept that has to be recorded.
    streams: Of the device that computes; a CPU's if None.

    Raises:
        UserError: The model is dense, or the profile that the settings name does not fit it.
    """

    def __init__(
        self,
        settings: Offload,
        hardware: Hardware | None,
        model: LayeredModel,
        folder: Path,
        store: Store,
        streams: Streams | None = None,
    ):
        refuse_dense(model)
        self.settings, self.hardware, self.model, self.stages = settings, hardware, model, store
        self._profile = settings.trace(model)
        self.path = folder / "experts.bin"
        self._streams = streams or Streams()
        self._writer = self._slow_tier()
        self._tier: SlowTier | None = None
        self.engine: Engine | None = None

    def _slow_tier(self) -> TierWriter:
        """A file, or beside a device with memory of its own the host's; with the CPU at work there, if it is to be."""
        if not self._streams.apart:
            return ExpertFileWriter(self.path).__enter__()
        beside = None if self.settings.on_miss == "fetch" else CpuBackend()
        return HostWriter(self.model.depth, self._streams, beside)

    def add(self, layer: nn.Module) -> None:
        """The next layer in its final form: its experts go to the slow tier."""
        experts, formats = experts_of(layer, self.model), self.settings.formats
        formats.prepare(experts)
        with named(self.path):
            self._writer.add(experts)
        self._as_made = experts
        if formats.narrow is not None:
            assert self.model.family.moe is not None
            layer.set_submodule(self.model.family.moe.experts, half_experts(experts, formats.narrow))

    def find_profile(self, routing: Routing | None, calibration: Tensor | None, text: str) -> None:
        """See to the trace to place and predict by, where the settings name none: before the model is deployed, as
        recording one runs it where it is read.

        Args:
            routing: What the calibration pass recorded, if it did.
            calibration: Else token windows (n, t) to record a trace on.
            text: What they are of.
        """
        if self._profile is None and routing is not None:
            told = routing.trace(self.model.folder.name, text)
            self._profile = replace(told, decode=np.ones_like(told.decode))  # token by token, as it will be decoded
        if self._profile is None:
            assert calibration is not None
            self._profile = routing_trace(self.stages, self.model, calibration, text)

    def engage(self, layers: list[nn.Module]) -> None:
        """All layers are there, and deployed: build the engine."""
        assert self._profile is not None, "find_profile comes first"
        tier: SlowTier = self._writer.open()
        self._tier = tier
        conversion = self.settings.formats.conversion(self._as_made, tier.parts) or self._writer.relayout(self._as_made)
        if conversion is not None:
            tier = ConvertedTier(tier, conversion, self._streams.device)
        self.engine = self.settings.engage(self.model, layers, tier, self._profile, self.hardware, self._streams)
        self._start = self.engine.policy.resident.copy()

    def metrics(self) -> dict[str, float]:
        """What the engine has counted, by full names."""
        return {} if self.engine is None else self.engine.stats()

    def simulated(self, label: str) -> dict[str, float]:
        """The same steps on the run's hardware, as `simulated.<label>.` metrics; none where none is named."""
        if self.engine is None or self.hardware is None or not self.engine.heard.decoded:
            return {}
        assert self._profile is not None
        shape = Shape.of(self.model.config, self.model.experts, self.model.int8_head is not None)
        timeline = self.settings.simulate(self.engine, self._start, self._profile, self.hardware, shape)
        return timeline.metrics(label)

    def table(self) -> pd.DataFrame:
        """The same by layer, with the residents."""
        return pd.DataFrame([] if self.engine is None else self.engine.table())

    def close(self) -> None:
        """Stop the engine and remove the slow tier."""
        if self.engine is not None:
            self.engine.close()
        elif self._tier is not None:  # the settings were refused
            self._streams.drain()
            self._tier.close()
        self._writer.__exit__()
        self.path.unlink(missing_ok=True)
