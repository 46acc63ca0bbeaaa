"""Run the calibration tokens through the model layer by layer, and gather the input statistics of each group.

With `inputs=quantized` the pipeline is sequential. The statistics of a group come from a model in which earlier layers,
and earlier groups of the same layer, are already int8. Asymmetric calibration depends on this: an error that one
projection has compensated must not be compensated again by the next one.
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
from haq_lab.models.families.family import Group
from haq_lab.models.layerwise import LayeredModel
from haq_lab.result_cache.store import Store
from haq_lab.routing.choices import Routing
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.timer import Stopwatch

CALIBRATION = "/calibration"  # name of the calibration hidden states in a pass
HESSIAN_BYTES = 2 << 30  # most bytes of Hessians of the experts that are observed in one forward


class Calibrator:
    """Gathers the `InputStatistics` of each group while a pass visits the layers in order.

    For every layer call `enter`, then `statistics` for each group, then `leave`.

    Args:
        model: The full-precision model.
        needs: The statistics that the quantizer needs.
        windows: Token windows (n, t), or None if no statistics are needed.
        policy: Which hidden states are used, and which tokens for an expert.
        clock: Records the stages `calibrate` (statistics) and `forward` (tokens through layers).
        buffer: Buffer for the hidden states.
        store: The result cache, with the full-precision statistics of earlier runs.
        at: Index of the next layer for the hidden states, stored under `CALIBRATION`. They lag behind the pass while
            the statistics come from the result cache.

    Attributes:
        routing: Routing of the calibration tokens so far. None for a dense model, or if no statistics are needed.

    Example:
        >>> calibrator.enter(layer, index)  # doctest: +SKIP
        >>> for group in model.groups_of(index):
        ...     statistics = calibrator.statistics(layer, index, group)
        ...     ...  # quantise the group
        >>> calibrator.leave(layer, index)
    """

    def __init__(
        self,
        model: LayeredModel,
        needs: Needs,
        windows: Tensor | None,
        policy: CalibrationPolicy,
        clock: Stopwatch,
        buffer: HiddenStateBuffer,
        store: Store,
        at: dict[str, int],
    ):
        self.model, self.needs, self.policy, self.clock = model, needs, policy, clock
        self.hidden = self.hidden_fp = None
        self.routing: Routing | None = None
        self._sensitivity: list[LayerSensitivity] = []
        self._at = at
        if needs.inputs and windows is not None:
            self._cached = CachedCalibration(store, model, windows, policy)
            at[CALIBRATION] = 0
            if needs.sensitivity:
                with clock.stage("sensitivity"):
                    self._sensitivity = self._cached.sensitivity(needs.sensitivity, self._measure_sensitivity)
            self.hidden = model.embed(windows, buffer.empty)
            if needs.cross and policy.inputs == "quantized":
                self.hidden_fp = buffer.copy(self.hidden)
            if model.experts:
                self.routing = Routing(model.experts, model.kinds.moe_layers, (windows.shape[0], windows.shape[1]))
        self._inputs_fp: dict[str, Tensor] = {}
        self._statistics: dict[str, InputStatistics] = {}

    def enter(self, layer: nn.Module, index: int) -> None:
        """Prepare the statistics of a layer. Call it before the layer is changed.

        Args:
            layer: Decoder layer `index` at full precision.
        """
        self._statistics = {}
        if self.hidden is None:
            return
        if self.hidden_fp is not None:
            sites = [group.site for group in self.model.groups_of(index) if group.expert is None]
            with self.clock.stage("forward"):
                self._inputs_fp = record_inputs(self.model, layer, index, self.hidden_fp, sites)
        if self.policy.inputs == "fp":
            observe = partial(self._observe_layer, layer, index)
            routing = None if self.model.moe_of(index) is None else self.routing
            self._statistics = self._cached.statistics(index, self.needs, routing, observe)

    def statistics(self, layer: nn.Module, index: int, group: Group) -> InputStatistics | None:
        """Return the statistics of one group's input, and forget them.

        Args:
            layer: Decoder layer `index` with the earlier groups as they are now.

        Returns:
            The statistics, or None if the quantizer needs none.
        """
        if self.hidden is None:
            return None
        if group.site not in self._statistics:
            self._observe(layer, index, self.hidden, self._groups_to_observe(layer, index, group))
        statistics = self._statistics.pop(group.site)
        if self._sensitivity:
            statistics.sensitivity = self._sensitivity[index][group.site]
        return statistics

    def leave(self, layer: nn.Module, index: int) -> None:
        """Advance the hidden states past a layer. Call it after the layer is quantised."""
        if self.hidden is not None and self.policy.inputs == "quantized":
            self._advance(layer, index, self.hidden)

    def _advance(self, layer: nn.Module, index: int, hidden: Tensor) -> None:
        with self.clock.stage("forward"):
            self.model.run(layer, index, hidden)
            self._at[CALIBRATION] = index + 1

    def _measure_sensitivity(self, windows: Tensor) -> list[LayerSensitivity]:
        on_disk = HiddenStateBuffer(limit=0)  # it holds the states of all layers, so memory would grow with depth
        return measure_sensitivity(self.model, windows, on_disk)

    def _observe_layer(self, layer: nn.Module, index: int) -> dict[str, InputStatistics]:
        """Gather the statistics of all groups of an unchanged layer, and advance the hidden states past it."""
        assert self.hidden is not None
        groups = self.model.groups_of(index)
        for earlier in range(self._at[CALIBRATION], index):
            self._advance(self.model.load_layer(earlier), earlier, self.hidden)
        self._observe(layer, index, self.hidden, [group for group in groups if group.expert is None])
        for group in groups:
            if group.site not in self._statistics:
                self._observe(layer, index, self.hidden, self._groups_to_observe(layer, index, group))
        self._advance(layer, index, self.hidden)
        return self._statistics

    def _groups_to_observe(self, layer: nn.Module, index: int, group: Group) -> list[Group]:
        """Return the groups to observe in one forward: `group`, and as many later experts as memory allows."""
        if group.expert is None:
            return [group]
        groups = self.model.groups_of(index)
        later = takewhile(lambda other: other.expert is not None, groups[groups.index(group) :])
        limit = HESSIAN_BYTES // (4 * channels_of(layer, group) ** 2) if self.needs.hessian else len(groups)
        return list(later)[: max(limit, 1)]

    def _observe(self, layer: nn.Module, index: int, hidden: Tensor, groups: list[Group]) -> None:
        observers = [self._observer(layer, index, group, hidden.shape[0] * hidden.shape[1]) for group in groups]
        observe(self.model, layer, index, hidden, observers, self.clock)
        with self.clock.stage("calibrate"):
            self._statistics |= {observer.group.site: observer.finish() for observer in observers}

    def _observer(self, layer: nn.Module, index: int, group: Group, tokens: int) -> SharedInput | ExpertInside:
        inputs_fp = self._inputs_fp.get(group.site)
        moe = self.model.moe_of(index)
        if moe is None or self.routing is None:
            return SharedInput(layer, group, self.needs, tokens, inputs_fp)
        if group.expert is not None:
            counts = self.routing.counts(index)
            few = int(counts[group.expert]) < self.policy.min_tokens
            return ExpertInside(layer, group, self.needs, moe.experts, tokens, counts, few)
        if group.feeds_experts:
            return ExpertsInput(layer, group, self.needs, moe.experts, tokens, inputs_fp, self.policy, self.routing)
        return SharedInput(layer, group, self.needs, tokens, inputs_fp)
