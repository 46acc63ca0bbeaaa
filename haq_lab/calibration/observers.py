"""What is gathered at a group's input: one for inputs that all tokens have, two for what the router divides."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import Accumulator, CalibrationPolicy, InputStatistics, Needs
from haq_lab.models.architectures import Group
from haq_lab.models.experts import Expert
from haq_lab.routing.choices import Routing

SHOWN_PER_CHANNEL = 4  # of the layer's tokens, to an expert that has too few of its own: enough for a full rank


class SharedInput:
    """Statistics of an input that every token has.

    Args:
        tokens: How many there are in all.
        inputs_fp: What the same group receives in the full-precision model, (tokens, k), for `needs.cross`.
    """

    def __init__(self, layer: nn.Module, group: Group, needs: Needs, tokens: int, inputs_fp: Tensor | None):
        self.group, self.needs, self.tokens, self.inputs_fp = group, needs, tokens, inputs_fp
        self.sites: tuple[str, ...] = (group.site,)
        self.channels = channels_of(layer, group)
        self._all = Accumulator(self.channels, tokens, needs)

    def add(self, inputs: dict[str, Tensor], rows: slice) -> None:
        """One batch."""
        self._all.add(inputs[self.group.site], None if self.inputs_fp is None else self.inputs_fp[rows])

    def finish(self) -> InputStatistics:
        """The statistics of all that was added."""
        return self._all.finish()


class ExpertsInput(SharedInput):
    """The input that the router and all experts share, and what the router makes of it.

    With `route=topk` each expert has statistics of its own tokens besides. The router's choices go to `routing`
    in any case.
    """

    def __init__(
        self,
        layer: nn.Module,
        group: Group,
        needs: Needs,
        tokens: int,
        inputs_fp: Tensor | None,
        policy: CalibrationPolicy,
        routing: Routing,
    ):
        super().__init__(layer, group, needs, tokens, inputs_fp)
        self.policy, self.routing = policy, routing
        self._router = layer.get_submodule(group.site)
        self._chosen: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._by_expert: dict[int, Accumulator] = {}
        if policy.route == "topk" and needs.hessian:
            self._by_expert = {e: Accumulator(self.channels, tokens, needs) for e in range(routing.experts)}

    def add(self, inputs: dict[str, Tensor], rows: slice) -> None:
        super().add(inputs, rows)
        x = inputs[self.group.site].reshape(-1, self.channels)
        _, weights, chosen = self._router(x)
        self._chosen.append(chosen)
        self._weights.append(weights)
        for expert, accumulator in self._by_expert.items():
            own = (chosen == expert).any(dim=1)
            x_fp = None if self.inputs_fp is None else self.inputs_fp[rows][own]
            accumulator.add(x[own], x_fp)

    def finish(self) -> InputStatistics:
        self.routing.add_layer(torch.cat(self._chosen), torch.cat(self._weights))
        shared = super().finish()
        for expert, accumulator in self._by_expert.items():
            enough = accumulator.count >= self.policy.min_tokens
            shared.routed[expert] = accumulator.finish() if enough else shared.standing_in()
        return shared


class ExpertInside:
    """What one expert's down projection reads, of the tokens routed to it.

    An expert with too few is also shown tokens that the router sent elsewhere, evenly spaced: its own channels
    mean nothing in another expert, so no other's statistics can stand in.

    Args:
        experts: Name of the layer's experts module.
        tokens: How many tokens there are, and `counts`, how many of them the router sends to each expert.
        few: Too few are sent to this one.
    """

    def __init__(
        self, layer: nn.Module, group: Group, needs: Needs, experts: str, tokens: int, counts: Tensor, few: bool
    ):
        self.group, self._few, self._experts = group, few, experts
        self._site = group.site
        channels = channels_of(layer, group)
        self._stride = max(1, tokens // (SHOWN_PER_CHANNEL * channels))
        self.sites: tuple[str, ...] = (self._site, experts) if few else (self._site,)
        self._expert: Expert = cast(Any, layer.get_submodule(experts)).expert(group.expert)
        routed = int(counts[group.expert])
        self._share = routed / int(counts.sum())
        self._rows = Accumulator(channels, tokens // self._stride + routed if few else routed, needs)

    def add(self, inputs: dict[str, Tensor], rows: slice) -> None:
        """One batch; the expert may have no token in it."""
        if self._site in inputs:
            self._rows.add(inputs[self._site], None)
        if self._few:
            hidden = inputs[self._experts]
            self._rows.add(self._expert.activate(hidden[-rows.start % self._stride :: self._stride]), None)

    def finish(self) -> InputStatistics:
        """The statistics of all that was added. A routed input has no cross moment: where the full-precision
        model sends a token elsewhere, there is nothing to hold it against."""
        statistics = self._rows.finish()
        statistics.cross = None
        statistics.stands_in = self._few
        statistics.share = self._share
        return statistics


def channels_of(layer: nn.Module, group: Group) -> int:
    """Channels of a group's input."""
    weight = cast(Tensor, layer.get_submodule(group.consumers[0]).weight)
    return weight.shape[1]
