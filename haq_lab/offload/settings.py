"""The settings of `offload=...`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from haq_lab.offload.budget import Budget
from haq_lab.offload.costs.cost_model import Objective
from haq_lab.offload.policies.eviction_rules import online_rules
from haq_lab.offload.policies.placement import Placement
from haq_lab.offload.policies.policy import Scope
from haq_lab.offload.tiers.formats import DeviceFormat, Formats, HostFormat
from haq_lab.utils.errors import UserError, invalid


@dataclass(frozen=True)
class Offload:
    """The settings that place a model's experts in a fast and a slow memory tier.

    Args:
        budget: Size of the fast tier: a share of all experts' bytes ("40%"), bytes ("500MB"), or a number of experts.
        placement: The rule that chooses the experts that are resident at the start.
        eviction: The rule that chooses the expert to evict, a name in `EVICTION_RULES`. With `none`, the placed
            experts stay.
        scope: `layer` if an expert may evict only experts of its own layer, `global` if any.
        prefetch: How the next layer's experts are guessed: `next_gate` applies its router early, `path` uses the
            expert transitions of the calibration trace.
        on_miss: What happens to a missing expert. `fetch` copies it to the fast tier, `cpu` runs it in the slow tier.
            `predict` does what the latency predictor finds faster.
        objective: What the latency predictor minimises.
        host_format: Number format of experts in the slow tier.
        device_format: Number format of experts in the fast tier.
        spare: Slots for prefetched experts and for missing experts that are not cached. Experts of each size have that
            many.
        kv_tokens: Context length in tokens. A budget in bytes reserves room for its KV cache and its workspace.
        profile: Path of the routing trace for placement and prediction. If None, one is recorded on the calibration
            text.
        seed: Seed of random placement.

    Raises:
        UserError: The budget or the eviction rule is not valid, or prefetching has too few spare slots.

    Example:
        Offload(budget="40%", eviction="lru", prefetch="path")
    """

    budget: str | int = "50%"
    placement: Placement = "two_stage"
    eviction: str = "haq"
    scope: Scope = "global"
    prefetch: Literal["none", "next_gate", "path"] = "none"
    on_miss: Literal["fetch", "cpu", "predict"] = "fetch"
    objective: Objective = "max"
    host_format: HostFormat = "int8"
    device_format: DeviceFormat = "int8"
    spare: Annotated[int, Field(ge=1)] = 4
    kv_tokens: Annotated[int, Field(ge=0)] = 2048
    profile: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.parsed_budget  # raises UserError if it is not valid
        if self.eviction not in online_rules():
            raise invalid("offload.eviction", self.eviction, online_rules())
        if self.prefetch != "none" and self.spare < 2:
            raise UserError(
                f"offload.spare: {self.spare} is too few, because prefetching needs at least 2 spare slots. "
                "Choose offload.spare=2 or more, or offload.prefetch=none."
            )

    @cached_property
    def parsed_budget(self) -> Budget:
        """The budget as a share, bytes or a number of experts."""
        return Budget.parse(self.budget)

    @property
    def formats(self) -> Formats:
        """The number formats of the two tiers."""
        return Formats(self.host_format, self.device_format)

    def must_suit(self, device: torch.device, quantized: bool) -> None:
        """Check these settings against the backend's device and the quantizer.

        Beside a GPU, the CPU can run int8 experts only. Their products are exact and their SwiGLU is specified to the
        bit. Float experts would give other results on the CPU, so the output would depend on the budget.

        Args:
            device: Device of the backend.
            quantized: Whether the model's linears are int8.

        Raises:
            UserError: The device or the model does not support a setting.
        """
        self.formats.must_suit(quantized, self.on_miss)
        if device.type != "cpu" and self.on_miss != "fetch" and not quantized:
            raise UserError(
                f"offload.on_miss: '{self.on_miss}' runs experts on the CPU, which with a GPU needs int8 experts. "
                "Choose offload.on_miss=fetch or a quantizer."
            )
