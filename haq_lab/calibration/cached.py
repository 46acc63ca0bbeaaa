"""Read and write calibration results in the result cache: the sensitivity, and with `inputs=fp` all statistics.

Statistics are stored per layer and per part. So a quantizer that needs only ranges can use the results of one that also
needed Hessians, and an interrupted run can use the layers that it finished.
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

CODE = ("haq_lab.calibration.calibrator",)  # it computes the results that are stored here
PARTS = {"range": ("channel_max",), "hessian": ("hessian",), "cross": ("cross",), "sample": ("sample", "sample_weight")}
ROUTING = ("chosen", "weights")
SENSITIVITY = ("channels", "outputs")


class CachedCalibration:
    """The calibration results of one full-precision model and text.

    Args:
        store: The result cache.
        model: The full-precision model.
        windows: Calibration token windows (n, t).
        policy: How statistics are gathered.
    """

    def __init__(self, store: Store, model: LayeredModel, windows: Tensor, policy: CalibrationPolicy):
        self.store, self.model, self.policy = store, model, policy
        self._enabled = store.folder is not None
        self._windows = windows
        self._text = of_text(model, windows) if self._enabled else {}

    def sensitivity(self, count: int, measure: Callable[[Tensor], list[LayerSensitivity]]) -> list[LayerSensitivity]:
        """Return the sensitivity of every layer from the result cache, or measure and store it.

        Args:
            count: Number of windows to measure on, from the first.
            measure: Measures the sensitivity on token windows (count, t).
        """
        windows = self._windows[:count]
        if not self._enabled:
            return measure(windows)
        key = key_of("sensitivity", CODE, **of_text(self.model, windows))
        result = self.store.fetch(
            "sensitivity", key, lambda: _pack_sensitivity(measure(windows)), about(self.model, windows)
        )
        layers: list[LayerSensitivity] = [{} for _ in range(self.model.depth)]
        for number, (index, site) in enumerate(result.facts):
            layers[index][site] = Sensitivity(*(result.tensors[f"{number}|{name}"] for name in SENSITIVITY))
        return layers

    def statistics(
        self, index: int, needs: Needs, routing: Routing | None, observe: Callable[[], dict[str, InputStatistics]]
    ) -> dict[str, InputStatistics]:
        """Return the statistics of a layer from the result cache, or gather and store them.

        Args:
            index: The decoder layer.
            needs: The statistics that the quantizer needs.
            routing: The layer's routing is added to it, from the cache or by `observe`. None for a dense model.
            observe: Gathers the statistics by site.

        Returns:
            The statistics by site.
        """
        if not self._enabled:
            return observe()
        keys = self._keys(index, needs)
        if (parts := self._get(keys)) is None:
            with self.store.locked(keys["range"]):
                if (parts := self._get(keys)) is None:
                    return self._observe_and_store(keys, routing, observe)
        if routing is not None:
            routing.add_layer(*(parts["range"].tensors[name] for name in ROUTING))
        return _unpack_statistics(parts)

    def _keys(self, index: int, needs: Needs) -> dict[str, str]:
        """Return the key of each part that is needed."""
        depends: dict[str, Any] = self._text | {"layer": index}
        if self.model.experts:
            depends |= {"min_tokens": self.policy.min_tokens, "apart": needs.hessian and self.policy.route == "topk"}
        parts = ["range", *(part for part in PARTS if getattr(needs, part, False))]
        return {part: key_of("statistics", CODE, part=part, **depends) for part in parts}

    def _get(self, keys: dict[str, str]) -> dict[str, Artifact] | None:
        parts: dict[str, Artifact] = {}
        for part, key in keys.items():
            if (result := self.store.get("statistics", key)) is None:
                return None
            parts[part] = result
        return parts

    def _observe_and_store(
        self, keys: dict[str, str], routing: Routing | None, observe: Callable[[], dict[str, InputStatistics]]
    ) -> dict[str, InputStatistics]:
        statistics = observe()
        parts = _pack_statistics(statistics, list(keys))
        if routing is not None:
            parts["range"].tensors |= dict(zip(ROUTING, (routing.chosen[-1], routing.weights[-1]), strict=True))
        size = sum(tensor.nbytes for result in parts.values() for tensor in result.tensors.values())
        if self.store.has_room("statistics", size * self.model.depth):  # else each layer would evict another one
            for part, key in keys.items():
                self.store.put("statistics", key, parts[part], f"{about(self.model, self._windows)}: {part}")
        return statistics


def _pack_sensitivity(layers: list[LayerSensitivity]) -> Artifact:
    sites = [(index, site, own) for index, layer in enumerate(layers) for site, own in layer.items()]
    tensors = {f"{number}|{name}": getattr(site[2], name) for number, site in enumerate(sites) for name in SENSITIVITY}
    return Artifact(tensors, [(index, site) for index, site, _ in sites])


def _pack_statistics(by_site: dict[str, InputStatistics], parts: list[str]) -> dict[str, Artifact]:
    """Split a layer's statistics into parts. An expert that uses the layer's statistics has no tensors of its own."""
    facts = []
    for site, statistics in by_site.items():
        routed = {expert: None if own.stands_in else own.count for expert, own in statistics.routed.items()}
        facts.append([site, statistics.count, statistics.stands_in, statistics.share, list(routed.items())])
    results = {part: Artifact(facts=facts if part == "range" else None) for part in parts}
    for name, statistics in _named(by_site):
        for part in parts:
            for field in PARTS[part]:
                if (tensor := getattr(statistics, field)) is not None:
                    results[part].tensors[f"{name}|{field}"] = tensor
    return results


def _named(by_site: dict[str, InputStatistics]) -> Iterator[tuple[str, InputStatistics]]:
    """Yield the statistics that have their own tensors, with their names in the file."""
    for number, statistics in enumerate(by_site.values()):
        yield f"{number}", statistics
        yield from ((f"{number}|{expert}", own) for expert, own in statistics.routed.items() if not own.stands_in)


def _unpack_statistics(parts: dict[str, Artifact]) -> dict[str, InputStatistics]:
    """Invert `_pack_statistics`."""
    tensors = {name: tensor for result in parts.values() for name, tensor in result.tensors.items()}
    fields = [field for names in PARTS.values() for field in names]

    def unpack(name: str, count: int, stands_in: bool, share: float = 1.0) -> InputStatistics:
        own = {field: tensors.get(f"{name}|{field}") for field in fields}
        return InputStatistics(count=count, stands_in=stands_in, share=share, **own)  # type: ignore[arg-type]

    by_site = {}
    for number, (site, count, stands_in, share, routed) in enumerate(parts["range"].facts):
        by_site[site] = shared = unpack(f"{number}", count, stands_in, share)
        for expert, own in routed:
            shared.routed[expert] = shared.standing_in() if own is None else unpack(f"{number}|{expert}", own, False)
    return by_site
