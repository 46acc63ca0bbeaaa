"""Share quantised layers and their measurements between runs through the result cache.

Runs that differ only in offloading or in what they time share both. The cache holds only results that follow from
settings and tokens. Every run measures latency and memory itself. The cache ignores classes from outside `haq_lab`,
because their code may read anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from haq_lab.calibration.channel_ranges import Ranges
from haq_lab.checkpoint.layer_tensors import LayerContent, int8_layer, layer_content, read_formats, read_forms
from haq_lab.config.build import Experiment
from haq_lab.measure.base import Measure, Study
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.apply import LinearReport
from haq_lab.quantizers.base import NO_PREFIX
from haq_lab.quantizers.pass_result import PassResult
from haq_lab.result_cache.keys import key_of, model_hash, of_settings, tokens_hash
from haq_lab.result_cache.store import Artifact, Store
from haq_lab.routing.choices import Routing
from haq_lab.utils.errors import UserError

LAYERS, PASS, MEASURED = "quantized", "pass", "measurement"
RANGES = "ranges|"  # prefix of the tensor names of channel ranges
CODE = ("haq_lab.pipeline.sequential", "haq_lab.checkpoint.layer_tensors")


class CachedPass:
    """The pass and the measurements of one run in the result cache.

    Args:
        store: The result cache.
        experiment: The run's settings.
        model: The model that the run quantises.
        calibration: Token windows (n, t), or None.
        evaluation: Token windows (n, t) by dataset.
        deploys: Whether the run needs the layers. If not, it needs only the measurements.
    """

    def __init__(
        self,
        store: Store,
        experiment: Experiment,
        model: LayeredModel,
        calibration: Tensor | None,
        evaluation: dict[str, Tensor],
        deploys: bool,
    ):
        self.store, self.experiment, self.model, self.deploys = store, experiment, model, deploys
        self.evaluation = evaluation
        builtin = all(map(_is_builtin, (experiment.quantizer, experiment.backend)))
        self._depends: dict[str, Any] | None = None
        if store.folder is not None and builtin and experiment.checkpoint is None and not model.quantized:
            self._depends = self._dependencies(calibration)
        self._about = f"{experiment.model.label}, {type(experiment.quantizer).__name__}"

    def _dependencies(self, calibration: Tensor | None) -> dict[str, Any]:
        statistics: dict[str, Any] = {"calibration": None}
        if calibration is not None:
            statistics = {"calibration": tokens_hash(calibration), "policy": asdict(self.experiment.calibration.policy)}
        quantizer, backend = self.experiment.quantizer, self.experiment.backend
        if quantizer is not None:
            quantizer = replace(quantizer, prefix=NO_PREFIX)  # the prefix's tokens count, not its name: `of_settings`
        own = {
            "model": model_hash(self.model.folder),
            "quantizer": _settings(quantizer),
            "backend": [backend.name, backend.device.type],
        }
        return statistics | own | of_settings(self.model)

    def find(self) -> PassResult | None:
        """Return the stored result of an equal pass, without hidden states. Return None if anything that this run
        needs is missing."""
        if self._depends is None or (found := self.store.get(PASS, self._key(PASS))) is None:
            return None
        needed = [measure for measure in self.experiment.measures.values() if measure.evaluates]
        if any(self._measurement(measure) is None for measure in needed):
            return None
        if self.deploys and any(self._layer(index) is None for index in range(self.model.depth)):
            return None
        passed = PassResult({}, [LinearReport(**report) for report in found.facts["reports"]])
        if found.facts["routing"] is not None:
            experts, windows = found.facts["routing"]
            chosen, weights = (
                [found.tensors[f"{name}|{number}"] for number in range(len(self.model.kinds.moe_layers))]
                for name in ("chosen", "weights")
            )
            passed.routing = Routing(experts, self.model.kinds.moe_layers, tuple(windows), chosen, weights)
        ranges = {name: rows for name, rows in found.tensors.items() if name.startswith(RANGES)}
        passed.ranges = Ranges.of({name.removeprefix(RANGES): rows for name, rows in ranges.items()})
        return passed

    def layers(self) -> Iterator[nn.Module]:
        """Yield the stored layers one by one, after `find`. Yield none if the run does not need them.

        Raises:
            UserError: Another process has just removed a layer from the result cache.
        """
        for index in range(self.model.depth if self.deploys else 0):
            found = self._layer(index)
            if found is None:
                raise UserError(
                    f"result_cache: layer {index} was just removed from {self.store.folder}. Start the run again."
                )
            path = Path(str(self.store.folder))
            content = LayerContent(found.tensors, read_forms(found.facts, path), read_formats(found.facts, path))
            yield int8_layer(self.model, index, content, self.experiment.backend, str(self.store.folder))

    def store_layer(self, index: int, layer: nn.Module) -> None:
        """Store a finished layer, if the cache has space."""
        if self._depends is None or not self.deploys or self.experiment.quantizer is None:
            return
        content = layer_content(layer)
        if self.store.has_room(LAYERS, sum(tensor.nbytes for tensor in content.tensors.values()) * self.model.depth):
            artifact = Artifact(content.tensors, content.metadata)
            self.store.put(LAYERS, self._key(LAYERS, layer=index), artifact, self._about)

    def store_pass(self, passed: PassResult) -> None:
        """Store the result of the pass, without hidden states."""
        if self._depends is None or self.experiment.quantizer is None:
            return
        facts: dict[str, Any] = {"reports": [asdict(report) for report in passed.reports], "routing": None}
        tensors = {f"{RANGES}{name}": rows for name, rows in passed.ranges.tensors().items()}
        if (routing := passed.routing) is not None:
            facts["routing"] = [routing.experts, routing.windows]
            for number, (chosen, weights) in enumerate(zip(routing.chosen, routing.weights, strict=True)):
                tensors |= {f"chosen|{number}": chosen, f"weights|{number}": weights}
        self.store.put(PASS, self._key(PASS), Artifact(tensors, facts), self._about)

    def measured(self, measure: Measure, study: Study) -> dict[str, float]:
        """Return a measure's metrics, from the cache if they follow from settings and tokens alone.

        The measure's tables are added to the study, also those from the cache.
        """
        if (found := self._measurement(measure)) is not None:
            study.tables |= {name: pd.DataFrame(columns) for name, columns in found.facts["tables"].items()}
            metrics: dict[str, float] = found.facts["metrics"]
            return metrics
        before = set(study.tables)
        metrics = measure(study)
        if self._cacheable(measure):
            tables = {name: table.to_dict("list") for name, table in study.tables.items() if name not in before}
            facts = {"metrics": metrics, "tables": tables}
            self.store.put(MEASURED, self._measurement_key(measure), Artifact(facts=facts), self._about)
        return metrics

    def _cacheable(self, measure: Measure) -> bool:
        return self._depends is not None and measure.evaluates and not measure.deploys and _is_builtin(measure)

    def _measurement(self, measure: Measure) -> Artifact | None:
        return self.store.get(MEASURED, self._measurement_key(measure)) if self._cacheable(measure) else None

    def _measurement_key(self, measure: Measure) -> str:
        texts = {name: tokens_hash(tokens) for name, tokens in self.evaluation.items()}
        return self._key(MEASURED, (type(measure).__module__,), measure=_settings(measure), texts=texts)

    def _layer(self, index: int) -> Artifact | None:
        return self.store.get(LAYERS, self._key(LAYERS, layer=index))

    def _key(self, stage: str, code: tuple[str, ...] = (), **depends: Any) -> str:
        assert self._depends is not None
        chosen = (self.experiment.quantizer, self.experiment.backend)
        code += tuple(type(thing).__module__ for thing in chosen if thing is not None)
        return key_of(stage, CODE + code, **self._depends, **depends)


def _settings(thing: Any) -> Any:
    """Return the class and the settings of a quantizer or a measure for JSON."""
    return None if thing is None else [type(thing).__qualname__, asdict(thing)]


def _is_builtin(thing: object) -> bool:
    return thing is None or type(thing).__module__.startswith("haq_lab.")
