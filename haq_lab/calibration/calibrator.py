"""The calibration tokens on their way through the model, a layer at a time.

With `inputs=quantized` the statistics of a group are taken with the layer as it then is: earlier layers and
the layer's earlier groups already in int8. This matters for asymmetric calibration: a projection that made up
for an error must not be followed by one that makes up for it again.
"""

from __future__ import annotations

from functools import partial
from itertools import takewhile

from torch import Tensor, nn

from haq_lab.calibration.cached import CachedCalibration
from haq_lab.calibration.hooks import observe, record_inputs
from haq_lab.calibration.observers import ExpertInside, ExpertsInput, SharedInput, channels_of
from haq_lab.calibration.sensitivity import LayerSensitivity, measure_sensitivity
from haq_lab.calibration.statistics import CalibrationPolicy, InputStatistics, Needs
from haq_lab.models.architectures import Group
from haq_lab.models.layerwise import LayeredModel
from haq_lab.result_cache.store import Store
from haq_lab.routing.choices import Routing
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.timer import Stopwatch

CALIBRATION = "/calibration"  # the name of its hidden states in a pass
HESSIAN_BYTES = 2 << 30  # of the experts that are observed in one forward


class Calibrator:
    """Hands out each group's `InputStatistics` in turn.

    Args:
        needs: What the quantizer asks for.
        windows: Token windows (n, t); None where nothing is needed.
        policy: On which hidden states, and on which tokens of an expert.
        clock: Gets the stages `calibrate` (statistics) and `forward` (tokens through layers).
        spool: Room for the hidden states.
        store: Where other runs have left what they asked of the full-precision model.
        at: Gets, under `CALIBRATION`, the layer before which the hidden states stand. They stay behind where the
            statistics of the layers are found in the store.

    Attributes:
        routing: The router's choices so far; None for a dense model, or where nothing is needed.
    """

    def __init__(
        self,
        model: LayeredModel,
        needs: Needs,
        windows: Tensor | None,
        policy: CalibrationPolicy,
        clock: Stopwatch,
        spool: HiddenStateBuffer,
        store: Store,
        at: dict[str, int],
    ):
        self.model, self.needs, self.policy, self.clock = model, needs, policy, clock
        self.hidden = self.hidden_fp = None
        self.routing: Routing | None = None
        self._sensitivity: list[LayerSensitivity] = []
        self._at = at
        if needs.inputs and windows is not None:
            self._stages = CachedCalibration(store, model, windows, policy)
            at[CALIBRATION] = 0
            if needs.sensitivity:
                with clock.stage("sensitivity"):
                    self._sensitivity = self._stages.sensitivity(needs.sensitivity, self._measure_sensitivity)
            self.hidden = model.embed(windows, spool.empty)
            if needs.cross and policy.inputs == "quantized":
                self.hidden_fp = spool.copy(self.hidden)
            if model.experts:
                self.routing = Routing(model.experts, (windows.shape[0], windows.shape[1]))
        self._inputs_fp: dict[str, Tensor] = {}
        self._known: dict[str, InputStatistics] = {}

    def enter(self, layer: nn.Module, index: int) -> None:
        """Before a layer is changed."""
        self._known = {}
        if self.hidden is None:
            return
        if self.hidden_fp is not None:
            sites = [group.site for group in self.model.groups if group.expert is None]
            with self.clock.stage("forward"):
                self._inputs_fp = record_inputs(self.model, layer, index, self.hidden_fp, sites)
        if self.policy.inputs == "fp":
            observe = partial(self._observe_layer, layer, index)
            self._known = self._stages.statistics(index, self.needs, self.routing, observe)

    def statistics(self, layer: nn.Module, index: int, group: Group) -> InputStatistics | None:
        """The statistics of one group's input; they are handed out once."""
        if self.hidden is None:
            return None
        if group.site not in self._known:
            self._observe(layer, index, self.hidden, self._together(layer, group))
        statistics = self._known.pop(group.site)
        if self._sensitivity:
            statistics.sensitivity = self._sensitivity[index][group.site]
        return statistics

    def leave(self, layer: nn.Module, index: int) -> None:
        """After a layer is quantised."""
        if self.hidden is not None and self.policy.inputs == "quantized":
            self._advance(layer, index, self.hidden)

    def _advance(self, layer: nn.Module, index: int, hidden: Tensor) -> None:
        with self.clock.stage("forward"):
            self.model.run(layer, index, hidden)
            self._at[CALIBRATION] = index + 1

    def _measure_sensitivity(self, windows: Tensor) -> list[LayerSensitivity]:
        on_disk = HiddenStateBuffer(limit=0)  # the states of all layers: memory must not grow with depth
        return measure_sensitivity(self.model, windows, on_disk)

    def _observe_layer(self, layer: nn.Module, index: int) -> dict[str, InputStatistics]:
        """The statistics of all groups, with the layer as it is; the hidden states are brought to it and past it."""
        assert self.hidden is not None
        for before in range(self._at[CALIBRATION], index):
            self._advance(self.model.load_layer(before), before, self.hidden)
        self._observe(layer, index, self.hidden, [group for group in self.model.groups if group.expert is None])
        for group in self.model.groups:
            if group.site not in self._known:
                self._observe(layer, index, self.hidden, self._together(layer, group))
        self._advance(layer, index, self.hidden)
        return self._known

    def _together(self, layer: nn.Module, group: Group) -> list[Group]:
        """The groups that are seen in the same forward: within experts, as many as there is room for."""
        if group.expert is None:
            return [group]
        groups = self.model.groups
        later = takewhile(lambda other: other.expert is not None, groups[groups.index(group) :])
        room = HESSIAN_BYTES // (4 * channels_of(layer, group) ** 2) if self.needs.hessian else len(groups)
        return list(later)[: max(room, 1)]

    def _observe(self, layer: nn.Module, index: int, hidden: Tensor, groups: list[Group]) -> None:
        watchers = [self._watcher(layer, index, group, hidden.shape[0] * hidden.shape[1]) for group in groups]
        observe(self.model, layer, index, hidden, watchers, self.clock)
        with self.clock.stage("calibrate"):
            self._known |= {watcher.group.site: watcher.finish() for watcher in watchers}

    def _watcher(self, layer: nn.Module, index: int, group: Group, tokens: int) -> SharedInput | ExpertInside:
        inputs_fp = self._inputs_fp.get(group.site)
        moe = self.model.family.moe
        if moe is None or self.routing is None:
            return SharedInput(layer, group, self.needs, tokens, inputs_fp)
        if group.expert is not None:
            counts = self.routing.counts(index)
            few = int(counts[group.expert]) < self.policy.min_tokens
            return ExpertInside(layer, group, self.needs, moe.experts, tokens, counts, few)
        if moe.router in group.float_consumers:
            return ExpertsInput(layer, group, self.needs, tokens, inputs_fp, self.policy, self.routing)
        return SharedInput(layer, group, self.needs, tokens, inputs_fp)
