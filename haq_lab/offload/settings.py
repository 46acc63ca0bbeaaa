"""The settings of `offload=...`, and the way from them to a running engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from haq_lab.hardware.spec import Hardware
from haq_lab.models.layerwise import LayeredModel
from haq_lab.offload.budget import Budget
from haq_lab.offload.costs.cost_model import Costs, Objective, Predictor
from haq_lab.offload.costs.from_spec import machine_costs
from haq_lab.offload.costs.measured import measure_costs
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.engine.cost_feedback import CostFeedback
from haq_lab.offload.engine.engine import Engine
from haq_lab.offload.policies.placement import Placement, place
from haq_lab.offload.policies.policy import Policy, Scope, make_policy
from haq_lab.offload.policies.prefetch import NextGate, NextOnPath, Prefetch
from haq_lab.offload.simulate.simulator import Simulator, Timeline
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.formats import DeviceFormat, Formats, HostFormat
from haq_lab.routing.statistics import Residency
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import UserError

FLOAT = 4  # bytes of a number in the key-value cache and the workspace, float32 on a CPU


@dataclass(frozen=True)
class Offload:
    """How a model's experts are kept on two tiers.

    Args:
        budget: Of the fast tier: a share of all experts ("40%"), bytes ("500MB"), or a number of experts.
        placement: Which experts are resident to begin with.
        eviction: Which one leaves; none: the placed ones stay.
        scope: Whether an expert makes room in its own layer only, or anywhere.
        prefetch: Read ahead for the next layer: by its router applied early, or by the calibration trace's paths.
        on_miss: A missing expert is fetched, runs in the slow tier, or whichever the predictor finds faster, for this
            machine or the one that `hardware=` names.
        objective: What the predictor minimises.
        host_format, device_format: Of experts in the slow and in the fast tier (`formats.py`).
        spare: Slots for experts that pass through and for guesses.
        kv_tokens: Context whose key-value cache, and workspace as a prompt, a budget in bytes must hold as well.
        profile: A trace file to place and predict by; null records one on the calibration text.
        seed: Of random placement.
    """

    budget: str | int = "50%"
    placement: Placement = "two_stage"
    eviction: Literal["none", "lru", "lfu", "moe_infinity", "haq"] = "haq"
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
        Budget.parse(self.budget)
        if self.prefetch != "none" and self.spare < 2:
            raise UserError("offload.spare: prefetching needs at least 2 spare slots")

    @property
    def formats(self) -> Formats:
        """In what numbers experts lie in the two tiers."""
        return Formats(self.host_format, self.device_format)

    def must_suit(self, device: torch.device, quantized: bool) -> None:
        """Raise `UserError` where these settings cannot be had on a backend's device, or for an unquantised model.

        Beside a GPU the CPU computes int8 products, which are exact, and a SwiGLU that is specified to the bit; what
        it makes of float weights would differ from what the GPU does, and the output with the budget.
        """
        self.formats.must_suit(quantized, self.on_miss)
        if device.type != "cpu" and self.on_miss != "fetch" and not quantized:
            raise UserError(
                f"offload.on_miss: '{self.on_miss}' runs experts on the CPU, beside a GPU only those in int8: with "
                "quantizer=none, say offload.on_miss=fetch"
            )

    def trace(self, model: LayeredModel) -> Trace | None:
        """The profile that was named, if one was.

        Raises:
            UserError: It is no trace, or another model's.
        """
        if self.profile is None:
            return None
        try:
            profile = Trace.open(Path(self.profile).expanduser())
            profile.must_be_of(model.depth, model.family.experts(model.config))
        except UserError as error:
            raise UserError(f"offload.profile: {error}") from error
        return profile

    def engage(
        self,
        model: LayeredModel,
        layers: list[nn.Module],
        store: SlowTier,
        profile: Trace,
        hardware: Hardware | None,
        streams: Streams | None = None,
    ) -> Engine:
        """Build the engine and attach the layers.

        Args:
            layers: Decoder layers in their final form.
            store: Their experts, written.
            profile: Calibration trace of this model.
            hardware: Whose costs the predictor decides by; None times this machine's.
            streams: Of the device that computes; a CPU's if None.

        Raises:
            UserError: The budget leaves no slot.
        """
        moe, shape = model.family.moe, Shape.of(model.config, model.experts, model.int8_head is not None)
        assert moe is not None
        reserved = FLOAT * (shape.kv_per_token + shape.work_per_token) * self.kv_tokens + store.room_bytes
        slots = Budget.parse(self.budget).slots(shape.layers * shape.experts, store.blob_bytes, self.spare, reserved)
        costs, observer = None, None
        if self.on_miss == "predict":
            if hardware is None:
                costs = measure_costs(layers[0], moe, store, model, streams)
            else:
                costs = machine_costs(hardware, shape, *self.formats.pair)
            if costs.from_disk:  # a GPU's are not corrected: its clock is another one
                observer = CostFeedback(costs, self.objective, shape.layers)
        policy = self.policy(place(self.placement, profile, slots, self.seed), profile, costs)
        prefetch: Prefetch | None = None
        if self.prefetch == "next_gate":
            prefetch = NextGate([layer.get_submodule(moe.router) for layer in layers])
        elif self.prefetch == "path":
            prefetch = NextOnPath(profile)
        guesses = min(profile.k, self.spare - 1) if prefetch is not None else 0
        engine = Engine(store, policy, self.spare, prefetch, guesses, observer, streams)
        engine.attach(layers, moe)
        return engine

    def policy(self, resident: Residency, profile: Trace, costs: Costs | None) -> Policy:
        """The policy that starts from these residents; a predictor decides by `costs`."""
        policy = make_policy(self.eviction, resident, profile, self.scope)
        if self.on_miss == "cpu":
            policy.decide = lambda present, missing: list(missing)
        elif self.on_miss == "predict":
            assert costs is not None
            policy.decide = Predictor(costs, self.objective).decide
        return policy

    def simulate(self, engine: Engine, start: Residency, profile: Trace, hardware: Hardware, shape: Shape) -> Timeline:
        """What the engine did, on another machine: the same routing and guesses from the same residents on."""
        costs = machine_costs(hardware, shape, *self.formats.pair)
        policy = self.policy(start, profile, costs)
        prefetch = engine.heard.prefetch() if engine.prefetch is not None else None
        return Simulator(costs, policy, prefetch, engine.guesses, self.spare).run(engine.heard.trace())


def refuse_dense(model: LayeredModel) -> None:
    """Raise `UserError` for a model without experts."""
    if model.family.moe is None:
        raise UserError(f"offload: a '{model.config.model_type}' has no experts to offload; add offload=none")


def experts_of(layer: nn.Module, model: LayeredModel) -> nn.ModuleList:
    """A layer's experts."""
    assert model.family.moe is not None
    return cast(nn.ModuleList, layer.get_submodule(model.family.moe.experts))
