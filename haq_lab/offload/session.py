"""Offloading within one run: experts leave memory as their layer is finished, an engine serves them afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor, nn

from haq_lab.calibration.routing import Routing
from haq_lab.models.layered import LayeredModel
from haq_lab.offload.engine import Engine
from haq_lab.offload.settings import Offload, experts_of, refuse_dense
from haq_lab.offload.store import StoreWriter
from haq_lab.stages.store import Store
from haq_lab.stages.trace import routing_trace


class OffloadSession:
    """Args:
    settings: The run's `offload`; a dense model is refused.
    folder: Where the slow tier lies while the run lasts.
    store: Where a trace is kept that has to be recorded.
    """

    def __init__(self, settings: Offload, model: LayeredModel, folder: Path, store: Store):
        refuse_dense(model)
        self.settings, self.model, self.stages = settings, model, store
        self.path = folder / "experts.bin"
        self._writer = StoreWriter(self.path).__enter__()
        self.engine: Engine | None = None

    def add(self, layer: nn.Module) -> None:
        """The next layer in its final form: its experts go to the slow tier."""
        self._writer.add(experts_of(layer, self.model))

    def engage(self, layers: list[nn.Module], routing: Routing | None, calibration: Tensor | None, text: str) -> None:
        """All layers are there: build the engine.

        Args:
            routing: What the calibration pass recorded, if it did.
            calibration: Else token windows (n, t) to record a trace on, where the settings name none.
        """
        profile = self.settings.trace()
        if profile is None and routing is not None:
            told = routing.trace(self.model.folder.name, text)
            profile = replace(told, decode=np.ones_like(told.decode))  # token by token, as it will be decoded
        if profile is None:
            assert calibration is not None
            profile = routing_trace(self.stages, self.model, calibration, text)
        self.engine = self.settings.engage(self.model, layers, self._writer.open(), profile)

    def metrics(self) -> dict[str, float]:
        """What the engine has counted, by full names."""
        return {} if self.engine is None else self.engine.stats()

    def table(self) -> pd.DataFrame:
        """The same by layer, with the residents."""
        return pd.DataFrame([] if self.engine is None else self.engine.table())

    def close(self) -> None:
        """Stop the engine and remove the slow tier's file."""
        if self.engine is not None:
            self.engine.close()
        self._writer.__exit__()
        self.path.unlink(missing_ok=True)
