"""Compare the hit rates of all policies at several budgets on one trace, with Belady's upper bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from haq_lab.offload.policies.eviction_rules import EVICTION_RULES
from haq_lab.offload.policies.path_model import fit_path_model
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import Scope, make_policy
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import UserError


@dataclass(frozen=True)
class Contender:
    """A published policy: its eviction rule, placement and scope."""

    name: str
    rule: str
    placement: str
    scope: Scope


CONTENDERS = (
    Contender("static (scheme 1; Fiddler)", "none", "frequency", "global"),
    Contender("static (scheme 2)", "none", "uniform", "layer"),
    Contender("static (scheme 3)", "none", "two_stage", "global"),
    Contender("LRU, per layer", "lru", "uniform", "layer"),
    Contender("LRU, global", "lru", "frequency", "global"),
    Contender("LFU, per layer", "lfu", "uniform", "layer"),
    Contender("LFU, global", "lfu", "frequency", "global"),
    Contender("MoE-Infinity, per layer", "moe_infinity", "uniform", "layer"),
    Contender("MoE-Infinity, global", "moe_infinity", "frequency", "global"),
    Contender("HAQ", "haq", "two_stage", "global"),
    Contender("Belady's bound", "belady", "frequency", "global"),
)


def hit_rates(
    profile: Trace, test: Trace, budgets: Sequence[float], finished: Callable[[], None] = lambda: None
) -> pd.DataFrame:
    """Replay the test trace with every policy.

    Args:
        profile: Calibration trace for placement and prediction.
        test: Trace to replay.
        budgets: Shares of all experts that are resident, such as 0.25.
        finished: Called after each replay.

    Returns:
        One row a policy and budget: `pairs`, `experts` (the two hit rates), `layer_std`, `fetched_per_token`.

    Raises:
        UserError: A budget is not a share or has no slot for an expert, or the traces are of different models.
    """
    profile.must_be_of(test.layers, test.expert_count)
    total = test.layers * test.expert_count
    for budget in budgets:
        if not 0 < budget <= 1 or round(budget * total) < 1:
            raise UserError(
                f"budgets: {budget} is not a share of {total} experts. Choose a value in (0, 1], such as 0.25."
            )
    model = fit_path_model(profile)
    rows = []
    for budget in budgets:
        slots = round(budget * total)
        placed = {rule: place(rule, profile, slots) for rule in {one.placement for one in CONTENDERS}}
        for one in CONTENDERS:
            known = test if EVICTION_RULES[one.rule].offline else profile
            policy = make_policy(one.rule, placed[one.placement], known, one.scope, model)
            rates = policy.replay(test)
            row = {"policy": one.name, "budget": budget, "slots": slots, "pairs": rates.pairs, "experts": rates.experts}
            rows.append(row | {"layer_std": rates.layer_std, "fetched_per_token": rates.fetched / rates.tokens})
            finished()
    return pd.DataFrame(rows)


def closed(table: pd.DataFrame) -> dict[float, float]:
    """Return the share of the gap between LRU or LFU and Belady's bound that HAQ closes, by budget.

    The better one of LRU and LFU counts. A budget for all experts has no gap, so it is left out.
    """
    shares = {}
    table = table[table["budget"] < 1]
    for budget, rows in table.groupby("budget"):
        pairs = rows.set_index("policy")["pairs"]
        best = max(value for name, value in pairs.items() if str(name).startswith(("LRU", "LFU")))
        shares[float(budget)] = float((pairs["HAQ"] - best) / (pairs["Belady's bound"] - best))  # type: ignore[arg-type]
    return shares
