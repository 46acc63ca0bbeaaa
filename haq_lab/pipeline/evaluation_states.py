"""The evaluation windows on their way through the model, a layer at a time: as it is, smoothed, and quantised."""

from __future__ import annotations

from torch import Tensor, nn

from haq_lab.models.layerwise import LayeredModel
from haq_lab.pipeline.cached_baseline import find_baseline, keep_baseline
from haq_lab.quantizers.pass_result import Level
from haq_lab.result_cache.store import Store
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer


class Evaluation:
    """Hidden states of every dataset at every level that a pass evaluates.

    Args:
        windows: Token windows (n, t) by dataset.
        quantizes: Whether the pass does; else there is one level, the model as it is.
        spool: Room for the hidden states.
        store: Where other runs have left those of the full-precision model, and where this one's go.
        at: Gets, under `<dataset>/<first>`, the layer before which the states of the model as it is stand.

    Attributes:
        first: The level of the model as it is: `quantized` where it was before.
        hidden: (n, t, d) by dataset and level.
    """

    def __init__(
        self,
        model: LayeredModel,
        windows: dict[str, Tensor],
        quantizes: bool,
        spool: HiddenStateBuffer,
        store: Store,
        at: dict[str, int],
    ):
        self.first: Level = "quantized" if model.quantized else "fp"
        self.hidden: dict[str, dict[Level, Tensor]] = {}
        self._model, self._windows, self._spool, self._store, self._at = model, windows, spool, store, at
        levels: tuple[Level, ...] = ("fp", "smoothed", "quantized") if quantizes else (self.first,)
        for name, own in windows.items():
            embedded = model.embed(own, spool.empty)
            self.hidden[name] = {level: embedded if level == self.first else spool.copy(embedded) for level in levels}
            found = self.first == "fp" and find_baseline(store, model, own, embedded)
            at[f"{name}/{self.first}"] = model.depth if found else 0
        self._computed = [name for name in windows if self.first == "fp" and not at[f"{name}/fp"]]

    def advance(self, level: Level, layer: nn.Module, index: int) -> None:
        """Carry a level's states through layer `index`, in the state that the level stands for."""
        for name, hidden in self.hidden.items():
            if self._at.get(f"{name}/{level}", index) <= index:
                self._model.run(layer, index, hidden[level])
                self._spool.release()
                if level == self.first:
                    self._at[f"{name}/{level}"] = index + 1

    def keep(self) -> None:
        """After the last layer: leave the full-precision states that were computed here to other runs."""
        for name in self._computed:
            keep_baseline(self._store, self._model, self._windows[name], self.hidden[name]["fp"])
