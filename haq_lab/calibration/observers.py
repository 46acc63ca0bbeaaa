"""Observers of a group's input: one for inputs of all tokens, and two for Mixture-of-Experts layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.calibration.hooks import Inputs
from haq_lab.calibration.statistics import Accumulator, CalibrationPolicy, InputStatistics, Needs
from haq_lab.int8.sequences import only_rows
from haq_lab.models.experts import Expert
from haq_lab.models.families.family import Group
from haq_lab.routing.choices import Routing

TOKENS_PER_CHANNEL = 4  # tokens of the layer that an expert with too few gets, so that its Hessian has full rank


class SharedInput:
    """Observes an input that every token has.

    Args:
        layer: The decoder layer.
        group: The group whose input is observed.
        needs: The statistics that the quantizer needs.
        tokens: Number of tokens in all batches.
        inputs_fp: (tokens, k) input of the same group in the full-precision model, for `needs.cross`.
    """

    def __init__(self, layer: nn.Module, group: Group, needs: Needs, tokens: int, inputs_fp: Tensor | None):
        self.group, self.needs, self.tokens, self.inputs_fp = group, needs, tokens, inputs_fp
        self.sites: tuple[str, ...] = (group.site,)
        self.channels = channels_of(layer, group)
        self._all = Accumulator(self.channels, tokens, needs)

    def add(self, inputs: Inputs, rows: slice) -> None:
        """Add one batch of inputs."""
        self._all.add(inputs[self.sites[0]][0], None if self.inputs_fp is None else self.inputs_fp[rows])

    def finish(self) -> InputStatistics:
        """Return the statistics of all batches."""
        return self._all.finish()


class ExpertsInput(SharedInput):
    """Observes the input that all experts share, and the router's choices.

    The choices are added to `routing`. With `route=topk`, each expert also gets statistics of its own tokens.
    """

    def __init__(
        self,
        layer: nn.Module,
        group: Group,
        needs: Needs,
        experts: str,
        tokens: int,
        inputs_fp: Tensor | None,
        policy: CalibrationPolicy,
        routing: Routing,
    ):
        super().__init__(layer, group, needs, tokens, inputs_fp)
        self.policy, self.routing = policy, routing
        self.sites = (experts,)
        self._chosen: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._by_expert: dict[int, Accumulator] = {}
        if policy.route == "topk" and needs.hessian:
            self._by_expert = {e: Accumulator(self.channels, tokens, needs) for e in range(routing.experts)}

    def add(self, inputs: Inputs, rows: slice) -> None:
        super().add(inputs, rows)
        x, chosen, weights = inputs[self.sites[0]]
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
    """Observes the input of one expert's down projection.

    An expert with too few tokens also gets evenly spaced tokens that the router sent elsewhere. Its channels have no
    meaning in another expert, so it cannot use another expert's statistics.

    Args:
        layer: The decoder layer.
        group: The expert's down projection.
        needs: The statistics that the quantizer needs.
        experts: Name of the layer's experts module.
        tokens: Number of tokens in all batches.
        counts: (E,) number of tokens that the router sends to each expert.
        few: Whether this expert has too few tokens.
    """

    def __init__(
        self, layer: nn.Module, group: Group, needs: Needs, experts: str, tokens: int, counts: Tensor, few: bool
    ):
        self.group, self._few, self._experts = group, few, experts
        self._site = group.site
        channels = channels_of(layer, group)
        self._stride = max(1, tokens // (TOKENS_PER_CHANNEL * channels))
        self.sites: tuple[str, ...] = (self._site, experts) if few else (self._site,)
        self._expert: Expert = cast(Any, layer.get_submodule(experts)).expert(group.expert)
        routed = int(counts[group.expert])
        self._share = routed / int(counts.sum())
        self._rows = Accumulator(channels, tokens // self._stride + routed if few else routed, needs)

    def add(self, inputs: Inputs, rows: slice) -> None:
        """Add one batch, which may have no token of this expert."""
        if self._site in inputs:
            self._rows.add(inputs[self._site][0], None)
        if self._few:
            hidden = inputs[self._experts][0]
            spaced = torch.arange(-rows.start % self._stride, len(hidden), self._stride)
            with only_rows(spaced):
                self._rows.add(self._expert.activate(hidden[spaced]), None)

    def finish(self) -> InputStatistics:
        """Return the statistics of all batches.

        They have no cross moment. The full-precision model may send a token to another expert, so it has no matching
        input.
        """
        statistics = self._rows.finish()
        statistics.cross = None
        statistics.stands_in = self._few
        statistics.share = self._share
        return statistics


def channels_of(layer: nn.Module, group: Group) -> int:
    """Return the number of channels of a group's input."""
    weight = cast(Tensor, layer.get_submodule(group.consumers[0]).weight)
    return weight.shape[1]
