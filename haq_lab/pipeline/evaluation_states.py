"""Run the evaluation windows through the original, the smoothed and the quantised model, one layer at a time."""

from __future__ import annotations

from torch import Tensor, nn

from haq_lab.models.layerwise import LayeredModel
from haq_lab.pipeline.cached_baseline import find_baseline, store_baseline
from haq_lab.quantizers.pass_result import Level
from haq_lab.result_cache.store import Store
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer


class Evaluation:
    """Hidden states of every evaluation dataset at every level.

    Args:
        windows: Token windows (n, t) by dataset.
        quantizes: Whether the pass quantises the model. If not, the only level is the model as it is.
        buffer: Holds the hidden states.
        store: The result cache for the hidden states of the full-precision model.
        next_layer: Receives the index of the next layer to run, under `<dataset>/<first>`.

    Attributes:
        first: The level of the model as it is: `quantized` for a quantised checkpoint, otherwise `fp`.
        hidden: Hidden states (n, t, d) by dataset and level.
    """

    def __init__(
        self,
        model: LayeredModel,
        windows: dict[str, Tensor],
        quantizes: bool,
        buffer: HiddenStateBuffer,
        store: Store,
        next_layer: dict[str, int],
    ):
        self.first: Level = "quantized" if model.quantized else "fp"
        self.hidden: dict[str, dict[Level, Tensor]] = {}
        self._model, self._windows, self._buffer, self._store = model, windows, buffer, store
        self._next_layer = next_layer
        levels: tuple[Level, ...] = ("fp", "smoothed", "quantized") if quantizes else (self.first,)
        for name, tokens in windows.items():
            embedded = model.embed(tokens, buffer.empty)
            self.hidden[name] = {level: embedded if level == self.first else buffer.copy(embedded) for level in levels}
            found = self.first == "fp" and find_baseline(store, model, tokens, embedded)
            next_layer[f"{name}/{self.first}"] = model.depth if found else 0
        self._computed = [name for name in windows if self.first == "fp" and not next_layer[f"{name}/fp"]]

    def advance(self, level: Level, layer: nn.Module, index: int) -> None:
        """Run a level's hidden states through layer `index`, unless the result cache supplied the states after it."""
        for name, hidden in self.hidden.items():
            if self._next_layer.get(f"{name}/{level}", index) <= index:
                self._model.run(layer, index, hidden[level])
                self._buffer.release()
                if level == self.first:
                    self._next_layer[f"{name}/{level}"] = index + 1

    def store_baselines(self) -> None:
        """Store the full-precision states that this pass computed in the result cache, after the last layer."""
        for name in self._computed:
            store_baseline(self._store, self._model, self._windows[name], self.hidden[name]["fp"])
