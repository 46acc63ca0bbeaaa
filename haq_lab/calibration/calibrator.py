"""The calibration tokens on their way through the model, a layer at a time.

With `propagate=quantized` the statistics of a group are taken with the layer as it then is: earlier layers and
the layer's earlier groups already in int8. This matters for asymmetric calibration: a projection that made up
for an error must not be followed by one that makes up for it again.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from haq_lab.calibration.observe import observe, record_inputs
from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.models.families import Group
from haq_lab.models.layered import LayeredModel
from haq_lab.stopwatch import Stopwatch


class Calibrator:
    """Hands out each group's `InputStatistics` in turn.

    Args:
        needs: What the quantizer asks for.
        windows: Token windows (n, t); None where nothing is needed.
        propagate: `fp`: statistics of the full-precision model; `quantized`: of the model as quantised so far.
        clock: Gets the stages `calibrate` (statistics) and `forward` (tokens through layers).
    """

    def __init__(
        self,
        model: LayeredModel,
        needs: Needs,
        windows: Tensor | None,
        propagate: Literal["fp", "quantized"],
        clock: Stopwatch,
    ):
        self.model, self.needs, self.propagate, self.clock = model, needs, propagate, clock
        self.hidden = model.embed(windows) if needs.inputs and windows is not None else None
        self.hidden_fp = None
        if self.hidden is not None and needs.cross and propagate == "quantized":
            self.hidden_fp = self.hidden.clone()
        self._inputs_fp: dict[str, Tensor] | None = None
        self._known: dict[str, InputStatistics] = {}

    def enter(self, layer: nn.Module, index: int) -> None:
        """Before a layer is changed."""
        self._known = {}
        if self.hidden is None:
            return
        sites = [group.consumers[0] for group in self.model.groups]
        if self.hidden_fp is not None:
            with self.clock.stage("forward"):
                self._inputs_fp = record_inputs(self.model, layer, index, self.hidden_fp, sites)
        if self.propagate == "fp":
            self._known = observe(self.model, layer, index, self.hidden, sites, self.needs, self.clock)
            with self.clock.stage("forward"):
                self.model.run(layer, index, self.hidden)

    def statistics(self, layer: nn.Module, index: int, group: Group) -> InputStatistics | None:
        """The statistics of one group's input."""
        if self.hidden is None:
            return None
        site = group.consumers[0]
        if site not in self._known:
            self._known |= observe(
                self.model, layer, index, self.hidden, [site], self.needs, self.clock, self._inputs_fp
            )
        return self._known[site]

    def leave(self, layer: nn.Module, index: int) -> None:
        """After a layer is quantised."""
        if self.hidden is not None and self.propagate == "quantized":
            with self.clock.stage("forward"):
                self.model.run(layer, index, self.hidden)
