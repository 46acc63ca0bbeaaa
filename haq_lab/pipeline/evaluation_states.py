"""Run the evaluation windows through the original, the smoothed and the quantised model, one layer at a time.

With a prefix, they also run through the original model without it, because the prefix alone changes its perplexity.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn

from haq_lab.models.layerwise import LayeredModel
from haq_lab.pipeline.cached_baseline import find_baseline, store_baseline
from haq_lab.prefix.attention import detached
from haq_lab.quantizers.base import Quantizer
from haq_lab.quantizers.pass_result import Level
from haq_lab.result_cache.store import Store
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer


class Evaluation:
    """Hidden states of every evaluation dataset at every level.

    Args:
        windows: Token windows (n, t) by dataset.
        quantizer: The method. If None, the only level is the model as it is. If it does not smooth, the levels `fp` and
            `smoothed` are one tensor.
        buffer: Holds the hidden states.
        store: The result cache for the hidden states of the full-precision model.
        next_layer: Receives the index of the next layer to run, under `<dataset>/<level>`, for the levels `as_it_is`.

    Attributes:
        as_it_is: The levels of the model as it is: `quantized` for a quantised checkpoint, otherwise `fp`, and
            `fp_no_prefix` if the model has a prefix.
        hidden: Hidden states (n, t, d) by dataset and level.
    """

    def __init__(
        self,
        model: LayeredModel,
        windows: dict[str, Tensor],
        quantizer: Quantizer | None,
        buffer: HiddenStateBuffer,
        store: Store,
        next_layer: dict[str, int],
    ):
        models: dict[Level, LayeredModel] = {"quantized" if model.quantized else "fp": model}
        if quantizer is not None and model.prefix is not None:
            models["fp_no_prefix"] = model.without_prefix()
        self.as_it_is: tuple[Level, ...] = tuple(models)
        self.hidden: dict[str, dict[Level, Tensor]] = {}
        self._model, self._models = model, models
        self._windows, self._buffer, self._store, self._next_layer = windows, buffer, store, next_layer
        self._computed: list[tuple[str, Level]] = []
        for name, tokens in windows.items():
            own: dict[Level, Tensor] = {level: each.embed(tokens, buffer.empty) for level, each in models.items()}
            if quantizer is not None:
                own["smoothed"] = buffer.copy(own["fp"]) if quantizer.smooths else own["fp"]
                own["quantized"] = buffer.copy(own["fp"])
            for level, each in models.items():
                found = level != "quantized" and find_baseline(store, each, tokens, own[level])
                next_layer[f"{name}/{level}"] = model.depth if found else 0
                if level != "quantized" and not found:
                    self._computed.append((name, level))
            self.hidden[name] = own

    def advance(self, level: Level, layer: nn.Module, index: int) -> None:
        """Run a level's hidden states through layer `index`, unless the result cache supplied the states after it."""
        model = self._models.get(level, self._model)
        for name, hidden in self.hidden.items():
            if self._next_layer.get(f"{name}/{level}", index) <= index:
                with detached(layer) if level == "fp_no_prefix" else nullcontext():
                    model.run(layer, index, hidden[level])
                self._buffer.release()
                if level in self.as_it_is:
                    self._next_layer[f"{name}/{level}"] = index + 1

    def store_baselines(self) -> None:
        """Store the full-precision states that this pass computed in the result cache, after the last layer."""
        for name, level in self._computed:
            store_baseline(self._store, self._models[level], self._windows[name], self.hidden[name][level])
