"""From the layers that a pass finishes to the whole model that is measured."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pandas as pd
from torch import nn

from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.checkpoint.provenance import provenance
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.config.build import Experiment
from haq_lab.data.windows import Windows
from haq_lab.models.layerwise import LayeredModel
from haq_lab.offload.session import OffloadSession
from haq_lab.offload.tiers.cuda_streams import make_streams
from haq_lab.quantizers.pass_result import PassResult
from haq_lab.result_cache.store import Store
from haq_lab.runtime.deploy import deploy
from haq_lab.tracking.run_folder import RunFolder
from haq_lab.utils.console import say


class Assembly:
    """Layers are kept in memory where a measure deploys the model, or written to a checkpoint and then read back.

    Where experts are offloaded, they leave memory layer by layer.

        with Assembly(experiment, model, folder, evaluation, calibration, store) as assembly:
            passed = sequential_pass(..., assembly.add, assembly.writer)
            whole = assembly.finish(passed, calibration)

    Attributes:
        model: What the layers belong to: the checkpoint, once it is written.
        writer: The checkpoint in the making, if one is asked for.

    Raises:
        UserError: The checkpoint's folder cannot be written to, or a dense model is to be offloaded.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: LayeredModel,
        folder: RunFolder,
        evaluation: dict[str, Windows],
        calibration: Windows | None,
        store: Store,
    ):
        self.experiment, self.model, self._folder = experiment, model, folder
        self.deploys = any(measure.deploys for measure in experiment.measures.values())
        self._layers: list[nn.Module] = []
        self._offload: OffloadSession | None = None
        self.writer: CheckpointWriter | None = None
        with ExitStack() as held:
            if experiment.offload is not None:
                streams = make_streams(experiment.backend.device)
                self._offload = OffloadSession(
                    experiment.offload, experiment.hardware, model, folder.path, store, streams
                )
                held.callback(self._offload.close)
            if experiment.checkpoint is not None:
                text = None if calibration is None else calibration.protocol
                origin = provenance(model.folder, experiment.model.label, folder.config, text)
                stamps = {name: windows.protocol for name, windows in evaluation.items()}
                force = bool(folder.config["force"])
                self.writer = CheckpointWriter(experiment.checkpoint, model, origin, stamps, force)
                held.callback(self.writer.release)
            self._held = held.pop_all()

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    @property
    def resumed(self) -> int:
        """How many layers an earlier run had done."""
        return 0 if self.writer is None else self.writer.resumed

    def add(self, layer: nn.Module) -> None:
        """The next layer in its final form."""
        if self.deploys and self.writer is None:
            self._keep(layer)

    def needs_trace(self, passed: PassResult) -> bool:
        """Whether `finish` needs calibration windows, to see which experts they choose."""
        offload = self.experiment.offload
        return offload is not None and self.deploys and passed.routing is None and offload.profile is None

    def finish(self, passed: PassResult, calibration: Windows | None) -> nn.Module:
        """All layers are done: the whole model, ready to run where a measure deploys it, else without layers."""
        if self.writer is not None:
            self.writer.finish()
            self.model = QuantizedModel(self.writer.folder, self.experiment.backend)
            for index in range(self.model.depth if self.deploys else 0):
                self._keep(self.model.load_layer(index))
        offload = self._offload if self._layers else None
        if offload is not None:
            tokens = None if calibration is None else calibration.tokens
            offload.find_profile(passed.routing, tokens, self.experiment.calibration.text)
        whole = deploy(self.model.assemble(self._layers), self.model, self.experiment.backend, self._report)
        if offload is not None:  # now, as deploying moves the weights that are in memory
            offload.engage(self._layers)
        return whole

    def metrics(self) -> dict[str, float]:
        """What offloading and the checkpoint have counted, by full names."""
        metrics = {} if self._offload is None else self._offload.metrics()
        if isinstance(self.model, QuantizedModel):
            metrics["memory.checkpoint_bytes"] = self.model.manifest.bytes
        return metrics

    def simulated(self, hardware: str) -> dict[str, float]:
        """What the run's decoding would take on the hardware that it names; none where none is named."""
        return {} if self._offload is None else self._offload.simulated(hardware)

    def tables(self) -> dict[str, pd.DataFrame]:
        """`offload`: what the engine has counted, by layer."""
        return {} if self._offload is None else {"offload": self._offload.table()}

    def facts(self) -> dict[str, Any]:
        """Where the checkpoint is, and from which layer on this run made it."""
        writer = self.writer
        return {} if writer is None else {"checkpoint": str(writer.folder), "resumed_from_layer": writer.resumed}

    def recorded(self) -> None:
        """The run's results are written: nothing is left to be resumed."""
        if self.writer is not None:
            self.writer.close()

    def _report(self, line: str) -> None:
        """Show a line and append it to the run's events."""
        say(line)
        self._folder.event("notice", text=line)

    def _keep(self, layer: nn.Module) -> None:
        if self._offload is not None:
            self._offload.add(layer)
        self._layers.append(layer)
