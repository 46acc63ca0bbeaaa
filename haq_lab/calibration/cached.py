"""What calibration asks of the full-precision model: its sensitivity, and with `inputs=fp` all its statistics.

Statistics are kept a layer and a part at a time: a quantizer that needs the ranges alone finds them where another
one needed Hessians too, and a killed run's layers are found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from haq_lab.calibration.sensitivity import LayerSensitivity
from haq_lab.calibration.statistics import CalibrationPolicy, InputStatistics, Needs, Sensitivity
from haq_lab.models.layerwise import LayeredModel
from haq_lab.result_cache.keys import about, key_of, of_text
from haq_lab.result_cache.store import Artifact, Store
from haq_lab.routing.choices import Routing

CODE = ("haq_lab.calibration.calibrator",)  # it gathers what is kept here
PARTS = {"range": ("channel_max",), "hessian": ("hessian",), "cross": ("cross",), "sample": ("sample", "sample_weight")}
ROUTING = ("chosen", "weights")
SENSITIVITY = ("channels", "outputs")


class CachedCalibration:
    """Both stages, of one model and text.

    Args:
        windows: Calibration token windows (n, t).
    """

    def __init__(self, store: Store, model: LayeredModel, windows: Tensor, policy: CalibrationPolicy):
        self.store, self.model, self.policy = store, model, policy
        self._kept = store.folder is not None
        self._windows = windows
        self._text = of_text(model, windows) if self._kept else {}

    def sensitivity(self, count: int, measure: Callable[[Tensor], list[LayerSensitivity]]) -> list[LayerSensitivity]:
        """That of every layer, which `measure` takes from the first `count` windows."""
        windows = self._windows[:count]
        if not self._kept:
            return measure(windows)
        key = key_of("sensitivity", CODE, **of_text(self.model, windows))
        told = about(self.model, windows)
        found = self.store.fetch("sensitivity", key, lambda: _sensitivity_artefact(measure(windows)), told)
        layers: list[LayerSensitivity] = [{} for _ in range(self.model.depth)]
        for number, (index, site) in enumerate(found.facts):
            layers[index][site] = Sensitivity(*(found.tensors[f"{number}|{name}"] for name in SENSITIVITY))
        return layers

    def statistics(
        self, index: int, needs: Needs, routing: Routing | None, observe: Callable[[], dict[str, InputStatistics]]
    ) -> dict[str, InputStatistics]:
        """Those of layer `index` by site, which `observe` gathers; the router's choices go to `routing` either way."""
        if not self._kept:
            return observe()
        keys = self._keys(index, needs)
        if (found := self._get(keys)) is None:
            with self.store.locked(keys["range"]):
                if (found := self._get(keys)) is None:
                    return self._observed(keys, routing, observe)
        if routing is not None:
            routing.add_layer(*(found["range"].tensors[name] for name in ROUTING))
        return _statistics(found)

    def _keys(self, index: int, needs: Needs) -> dict[str, str]:
        """A key for each part that is needed."""
        depends: dict[str, Any] = self._text | {"layer": index}
        if self.model.experts:
            depends |= {"min_tokens": self.policy.min_tokens, "apart": needs.hessian and self.policy.route == "topk"}
        parts = ["range", *(part for part in PARTS if getattr(needs, part, False))]
        return {part: key_of("statistics", CODE, part=part, **depends) for part in parts}

    def _get(self, keys: dict[str, str]) -> dict[str, Artifact] | None:
        found: dict[str, Artifact] = {}
        for part, key in keys.items():
            if (artefact := self.store.get("statistics", key)) is None:
                return None
            found[part] = artefact
        return found

    def _observed(
        self, keys: dict[str, str], routing: Routing | None, observe: Callable[[], dict[str, InputStatistics]]
    ) -> dict[str, InputStatistics]:
        known = observe()
        artefacts = _artefacts(known, list(keys))
        if routing is not None:
            artefacts["range"].tensors |= dict(zip(ROUTING, (routing.chosen[-1], routing.weights[-1]), strict=True))
        size = sum(tensor.nbytes for artefact in artefacts.values() for tensor in artefact.tensors.values())
        if self.store.has_room("statistics", size * self.model.depth):  # or each layer would push another one out
            for part, key in keys.items():
                self.store.put("statistics", key, artefacts[part], f"{about(self.model, self._windows)}: {part}")
        return known


def _sensitivity_artefact(layers: list[LayerSensitivity]) -> Artifact:
    sites = [(index, site, own) for index, layer in enumerate(layers) for site, own in layer.items()]
    own = {f"{number}|{name}": getattr(site[2], name) for number, site in enumerate(sites) for name in SENSITIVITY}
    return Artifact(own, [(index, site) for index, site, _ in sites])


def _artefacts(known: dict[str, InputStatistics], parts: list[str]) -> dict[str, Artifact]:
    """A layer's statistics, by part. An expert that the layer's stand in for is named without tensors of its own."""
    facts = []
    for site, statistics in known.items():
        routed = {expert: None if own.stands_in else own.count for expert, own in statistics.routed.items()}
        facts.append([site, statistics.count, statistics.stands_in, statistics.share, list(routed.items())])
    made = {part: Artifact(facts=facts if part == "range" else None) for part in parts}
    for name, statistics in _named(known):
        for part in parts:
            for field in PARTS[part]:
                if (tensor := getattr(statistics, field)) is not None:
                    made[part].tensors[f"{name}|{field}"] = tensor
    return made


def _named(known: dict[str, InputStatistics]) -> Iterator[tuple[str, InputStatistics]]:
    for number, statistics in enumerate(known.values()):
        yield f"{number}", statistics
        yield from ((f"{number}|{expert}", own) for expert, own in statistics.routed.items() if not own.stands_in)


def _statistics(found: dict[str, Artifact]) -> dict[str, InputStatistics]:
    """The inverse of `_artefacts`."""
    tensors = {name: tensor for artefact in found.values() for name, tensor in artefact.tensors.items()}
    fields = [field for names in PARTS.values() for field in names]

    def made(name: str, count: int, stands_in: bool, share: float = 1.0) -> InputStatistics:
        own = {field: tensors.get(f"{name}|{field}") for field in fields}
        return InputStatistics(count=count, stands_in=stands_in, share=share, **own)  # type: ignore[arg-type]

    known = {}
    for number, (site, count, stands_in, share, routed) in enumerate(found["range"].facts):
        known[site] = shared = made(f"{number}", count, stands_in, share)
        for expert, own in routed:
            shared.routed[expert] = shared.standing_in() if own is None else made(f"{number}|{expert}", own, False)
    return known
