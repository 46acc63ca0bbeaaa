"""Mixtral-8x7B with its experts offloaded, simulated, beside what was published: how far off each row is.

    python experiments/offload_published.py PROFILE.trace TEST.trace [--tokens 128]

Published figures are those of Fiddler's, mixtral-offloading's and MoE-Infinity's authors and of the HAQ paper's
abstract (arXiv 2402.07033, 2312.17238, 2401.14361 and its README, 2508.07329). Ours are simulated from cited hardware
figures. Routing is of the traces given, stretched to 32 layers: it is not Mixtral's, so what depends on hit rates is
given between routing that never hits and routing that always does as well. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from haq_lab.hardware.spec import load_hardware
from haq_lab.offload.costs.cost_model import Predictor
from haq_lab.offload.costs.from_spec import LINK_REACHED, machine_costs
from haq_lab.offload.costs.model_shape import MIXTRAL
from haq_lab.offload.policies.path_model import PathModel, fit_path_model
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.offload.policies.prefetch import NextOnPath
from haq_lab.offload.simulate.capacity_plan import fixed_bytes
from haq_lab.offload.simulate.simulator import Simulator
from haq_lab.offload.tiers.formats import Format
from haq_lab.routing.trace import Trace

CARD, CONTEXT = "rtx_a5000", 2048  # the card of MoE-Infinity's table
PCIE3 = 16.0  # GB/s, x16, nominal
PAPER_EXPERTS = 128  # of 256 on the GPU
EXPERTS = MIXTRAL.layers * MIXTRAL.experts


@dataclass(frozen=True)
class Row:
    """One published figure; `ours` is simulated or follows from sizes."""

    what: str
    published: float
    ours: float
    unit: str

    @property
    def off(self) -> float:
        return self.ours / self.published - 1


def slots_in(memory_gb: float) -> int:
    """Fiddler's rule: 95 % of the memory, less what is not an expert, in bf16."""
    rest = 2 * (MIXTRAL.layers * MIXTRAL.rest + 2 * MIXTRAL.outside)
    return int((0.95 * memory_gb * 1e9 - rest) // (2 * MIXTRAL.expert))


def simulated(
    rule: str,
    placement: str,
    scope: str,
    slots: int,
    formats: tuple[Any, Any],
    traces: tuple[Trace, Trace, PathModel],
    tokens: int,
    card: str = CARD,
    ahead: bool = False,
    in_place: bool = False,
) -> dict[str, float]:
    """ms a decoded token, its std, and the share of choices that hit."""
    profile, test, model = traces
    costs = machine_costs(load_hardware(card), MIXTRAL, *formats)
    policy = make_policy(rule, place(placement, profile, slots), profile, scope, model)  # type: ignore[arg-type]
    if in_place:
        policy.decide = Predictor(costs, "sum").decide
    prefetch = NextOnPath(profile) if ahead else None
    timeline = Simulator(costs, policy, prefetch, MIXTRAL.k if ahead else 0, spare=4).run(test, tokens)
    milliseconds = 1e3 * np.array(timeline.token_s)
    hit = make_policy(rule, place(placement, profile, slots), profile, scope, model).replay(test)  # type: ignore[arg-type]
    return {"ms": float(milliseconds.mean()), "std": float(milliseconds.std()), "hit_rate": hit.pairs}


def published(traces: tuple[Trace, Trace, PathModel], tokens: int) -> list[Row]:
    """The rows that can be compared."""
    bf16: tuple[Format, Format] = ("bf16", "fp16")
    card, expert = load_hardware(CARD), 2 * MIXTRAL.expert
    slots = slots_in(card.memory_gb)
    costs = machine_costs(card, MIXTRAL, *bf16)
    run = {
        "MoE-Infinity": simulated("moe_infinity", "uniform", "layer", slots, bf16, traces, tokens, ahead=True),
        "mixtral-offloading": simulated("lru", "uniform", "layer", slots, bf16, traces, tokens),
    }
    resident = MIXTRAL.layers * (costs.rest(1) + 2 * costs.fast(1)) + costs.outside(1)
    whole_layers = resident + (EXPERTS - slots) * costs.fetch(costs.expert_bytes)
    all_bf16 = fixed_bytes(MIXTRAL, "bf16", CONTEXT) + EXPERTS * expert
    kept = fixed_bytes(MIXTRAL, "int8", CONTEXT) + PAPER_EXPERTS * MIXTRAL.expert
    print("simulated hit rates:", {name: round(found["hit_rate"], 3) for name, found in run.items()}, "slots", slots)
    none = resident + MIXTRAL.layers * 2 * costs.fetch(costs.expert_bytes)
    print(f"no hit at all {none:.3f} s, all resident {resident:.3f} s a token, bf16, {card.name}")
    return [
        Row("expert, bf16 (Fiddler: over 300)", 300, expert / 1e6, "MB"),
        Row("expert over PCIe 3 x16 (Fiddler: about 50)", 50, 1e3 * expert / (PCIE3 * LINK_REACHED * 1e9), "ms"),
        Row("experts in 24 GB (Fiddler: 52-56)", 54, slots_in(24), "experts"),
        Row("experts in 48 GB (Fiddler: about 125)", 125, slots_in(48), "experts"),
        Row("A5000, MoE-Infinity", 0.735, run["MoE-Infinity"]["ms"] / 1e3, "s a token"),
        Row("A5000, mixtral-offloading", 1.752, run["mixtral-offloading"]["ms"] / 1e3, "s a token"),
        Row("A5000, Accelerate (all experts of a layer)", 6.633, whole_layers, "s a token"),
        Row("GPU memory, HAQ: W8A8, 128 of 256 experts, over bf16", -60, 100 * (kept / all_bf16 - 1), "%"),
    ]


def schemes(traces: tuple[Trace, Trace, PathModel], tokens: int) -> pd.DataFrame:
    """The paper's three placements, 128 experts on the GPU, W8A8: without a cache, and under two."""
    rows = []
    for number, placement in enumerate(("frequency", "uniform", "two_stage"), 1):
        for rule in ("none", "lru", "haq"):
            found = simulated(rule, placement, "global", PAPER_EXPERTS, ("int8", "int8"), traces, tokens)
            rows.append({"scheme": number, "cache": rule, **found})
    whole = simulated("none", "uniform", "global", EXPERTS, ("int8", "int8"), traces, tokens)
    return pd.DataFrame([*rows, {"scheme": 0, "cache": "all resident", **whole}])


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    profile, test = (
        Trace.open(path).stretched(MIXTRAL.layers, MIXTRAL.experts) for path in (given.profile, given.test)
    )
    traces = profile, test, fit_path_model(profile)
    rows = published(traces, given.tokens)
    for row in rows:
        print(f"{row.what:<56}{row.published:>10.3f}{row.ours:>10.3f} {row.unit:<10}{row.off:+8.0%}")
    table = schemes(traces, given.tokens)
    print(table.round(3).to_string(index=False))
    told = [asdict(row) | {"off": row.off} for row in rows]
    print(json.dumps({"simulated": CARD, "rows": told, "schemes": table.to_dict("records")}))


if __name__ == "__main__":
    main()
