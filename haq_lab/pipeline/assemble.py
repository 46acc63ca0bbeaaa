"""Assemble the model to measure from the layers that a pass finishes."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pandas as pd
from torch import nn

from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.checkpoint.model_card import write_model_card
from haq_lab.checkpoint.provenance import provenance
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.config.build import Experiment
from haq_lab.data.windows import Windows
from haq_lab.models.layerwise import LayeredModel
from haq_lab.offload.session import OffloadSession
from haq_lab.offload.tiers.cuda_streams import make_streams
from haq_lab.pipeline.deployment import Deployment
from haq_lab.quantizers.pass_result import PassResult
from haq_lab.result_cache.store import Store
from haq_lab.tracking.run_folder import RunFolder
from haq_lab.utils.console import say


class Assembly:
    """Collects finished layers in memory, or writes them to a checkpoint and reads them back.

    It keeps no layer if no measure needs the whole model. With offloading, the experts leave memory layer by layer.

    Args:
        experiment: The run's settings.
        model: The model that the pass quantises.
        folder: The run folder.
        evaluation: Evaluation windows by dataset.
        calibration: Calibration windows, or None.
        store: The result cache.

    Attributes:
        model: The model that the layers belong to. After `finish`, this is the checkpoint if the run writes one.
        writer: The writer of the checkpoint, or None if the run writes none.

    Raises:
        UserError: The checkpoint folder is not writable, or offloading is set for a model without experts.

    Example:
        >>> with Assembly(experiment, model, folder, evaluation, calibration, store) as assembly:
        ...     passed = sequential_pass(inputs, on_layer, assembly.writer)  # `on_layer` calls `assembly.add`
        ...     whole = assembly.finish(passed, calibration)
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
        self._offload: OffloadSession | None = None
        self.writer: CheckpointWriter | None = None
        with ExitStack() as resources:
            if experiment.offload is not None:
                streams = make_streams(experiment.backend.device)
                self._offload = OffloadSession(
                    experiment.offload, experiment.hardware, model, folder.path, store, streams
                )
                resources.callback(self._offload.close)
            if experiment.checkpoint is not None:
                text = None if calibration is None else calibration.protocol
                origin = provenance(model.folder, experiment.model.label, folder.config, text)
                stamps = {name: windows.protocol for name, windows in evaluation.items()}
                force = bool(folder.config["force"])
                self.writer = CheckpointWriter(experiment.checkpoint, model, origin, stamps, force)
                resources.callback(self.writer.release)
            self._resources = resources.pop_all()
        self._deployment = self._deploy(model)

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    @property
    def resumed(self) -> int:
        """Number of layers that an earlier run finished."""
        return 0 if self.writer is None else self.writer.resumed

    def add(self, layer: nn.Module) -> None:
        """Add the next finished layer."""
        if self.deploys and self.writer is None:
            self._deployment.add(layer)

    def needs_trace(self, passed: PassResult) -> bool:
        """Return whether `finish` needs calibration windows to record which experts they choose."""
        offload = self.experiment.offload
        return offload is not None and self.deploys and passed.routing is None and offload.profile is None

    def finish(self, passed: PassResult, calibration: Windows | None) -> nn.Module:
        """Return the whole model, after the last layer.

        Args:
            passed: The result of the pass.
            calibration: Calibration windows, or None. See `needs_trace`.

        Returns:
            The model, ready to run. It has no layers if no measure needs it.
        """
        if self.writer is not None:
            text, routing = self.experiment.calibration.text, passed.routing
            self.writer.finish(None if routing is None else routing.trace(self.model.folder.name, text))
            self.model = written = QuantizedModel(self.writer.folder, self.experiment.backend)
            self._deployment = self._deploy(written)
            for layer in written.load_layers() if self.deploys else ():
                self._deployment.add(layer)
        tokens = None if calibration is None else calibration.tokens
        return self._deployment.finish(passed.routing, tokens, self.experiment.calibration.text)

    def _deploy(self, model: LayeredModel) -> Deployment:
        return Deployment(model, self.experiment.backend, self._offload, self._report)

    def counting(self) -> AbstractContextManager[None]:
        """Return a context. The metrics of offloading cover only the steps within it."""
        return nullcontext() if self._offload is None else self._offload.counting()

    def aside(self) -> AbstractContextManager[None]:
        """Return a context. The metrics of offloading leave out the steps within it."""
        return nullcontext() if self._offload is None else self._offload.aside()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of offloading and of the checkpoint, by their full names."""
        metrics = {} if self._offload is None else self._offload.metrics()
        if isinstance(self.model, QuantizedModel):
            metrics["memory.checkpoint_bytes"] = self.model.manifest.bytes
        return metrics

    def simulated(self, hardware: str) -> dict[str, float]:
        """Return the simulated decoding time on `hardware`. Empty without offloading."""
        return {} if self._offload is None else self._offload.simulated(hardware)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the table `offload`: the counts of the offloading engine by layer."""
        return {} if self._offload is None else {"offload": self._offload.table()}

    def facts(self) -> dict[str, Any]:
        """Return what to record about the run.

        Returns:
            `checkpoint` and `resumed_from_layer` if the run writes a checkpoint. `offload_limitation` if a part of the
            eviction rule is off.
        """
        facts: dict[str, Any] = {}
        if self.writer is not None:
            facts |= {"checkpoint": str(self.writer.folder), "resumed_from_layer": self.writer.resumed}
        if self._offload is not None and self._offload.limitation is not None:
            facts["offload_limitation"] = self._offload.limitation
        return facts

    def recorded(self, results: dict[str, Any]) -> None:
        """Write the model card and close the checkpoint. The run's results are written, so there is nothing to resume.

        Args:
            results: Content of `results.json`.
        """
        if self.writer is not None:
            write_model_card(self.writer.folder, results["metrics"], results["protocol"])
            self.writer.close()

    def _report(self, line: str) -> None:
        """Show a line and append it to the run's events."""
        say(line)
        self._folder.event("notice", text=line)
