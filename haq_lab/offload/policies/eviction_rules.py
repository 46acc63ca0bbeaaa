"""The table of eviction rules. A new rule is one file in this folder and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from haq_lab.offload.policies.belady import belady
from haq_lab.offload.policies.haq import haq_eviction
from haq_lab.offload.policies.lfu import lfu
from haq_lab.offload.policies.lru import lru
from haq_lab.offload.policies.moe_infinity import moe_infinity
from haq_lab.offload.policies.path_model import PathModel, fit_path_model, path_limitation
from haq_lab.routing.trace import Trace

# From the shape (layers, experts of a layer), the profile and a fitted path model (None: fit one if needed) to a state.
MakeState = Callable[[tuple[int, int], Trace, PathModel | None], Any]


@dataclass(frozen=True)
class EvictionRule:
    """One eviction rule.

    Attributes:
        make_state: Makes the rule's state (see `eviction.py`).
        selective: A missing expert is not cached if it is worth less than every resident expert.
        admits: Missing experts may become resident. If False, the placed experts stay.
        offline: The rule needs the future, so only a replay can use it. It is not a choice of `offload.eviction`.
        limitation: Returns a sentence if a part of the rule is off for a number of layers and of experts in a layer.
    """

    make_state: MakeState
    selective: bool = False
    admits: bool = True
    offline: bool = False
    limitation: Callable[[int, int], str | None] = lambda layers, experts: None


EVICTION_RULES: dict[str, EvictionRule] = {
    "none": EvictionRule(lambda shape, profile, model: lru(*shape), admits=False),
    "lru": EvictionRule(lambda shape, profile, model: lru(*shape)),
    "lfu": EvictionRule(lambda shape, profile, model: lfu(*shape)),
    "moe_infinity": EvictionRule(lambda shape, profile, model: moe_infinity(profile)),
    "haq": EvictionRule(
        lambda shape, profile, model: haq_eviction(model or fit_path_model(profile)),
        selective=True,
        limitation=path_limitation,
    ),
    "belady": EvictionRule(lambda shape, profile, model: belady(profile), selective=True, offline=True),
}


def online_rules() -> list[str]:
    """Return the names of the rules that `offload.eviction` accepts."""
    return [name for name, rule in EVICTION_RULES.items() if not rule.offline]
