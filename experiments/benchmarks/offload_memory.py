"""Measure the memory of the fast tier against decode latency, by policy and budget, and draw the Pareto figure.

    python experiments/benchmarks/offload_memory.py CHECKPOINT --profile A.trace --text FILE [--figure FILE.png]

CHECKPOINT is a quantised checkpoint (`checkpoint.dir=`). Memory is everything in the fast tier: weights outside the
experts, the arena with its spare slots, and the KV cache and workspace of a context. Its share is relative to the
weights of the bf16 model. Each policy has one row with the budget at which the share is 40 % for the decoded context,
and one row with the budget at which it is 40 % for a context of 2,048 tokens. The plain int8 model decodes the same
text in turn, token by token, so that other work affects both. The ratio is the median over the tokens without the
first third, which fills the cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from offload_engine import SPARE, TOKENS, Bench, InStep

from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import parameter_count, weight_bytes
from haq_lab.offload.costs.measured import measure_costs
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.policies.path_model import fit_path_model
from haq_lab.offload.session import FLOAT
from haq_lab.routing.trace import Trace
from haq_lab.runtime.deploy import deploy
from haq_lab.utils.plotting import save

POLICIES = {
    "LRU, per layer": ("lru", "uniform", "layer", "fetch"),
    "haq": ("haq", "two_stage", "global", "fetch"),
    "haq, next gate": ("haq", "two_stage", "global", "next gate"),
}
SHARES = (0.25, 0.4, 0.55, 0.75)
AIM, BOUND = 0.40, 1.5
PROMPT, LONG = 64, 2048


@torch.no_grad()
def main() -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    plain = QuantizedModel(given.checkpoint, CpuBackend())
    ids = plain.tokenizer().encode(given.text.read_text(encoding="utf-8")[:20_000])[: PROMPT + TOKENS]
    resident = deploy(plain.assemble([plain.load_layer(index) for index in range(plain.depth)]), plain, CpuBackend())
    bf16 = 2 * parameter_count(resident)
    with tempfile.TemporaryDirectory(dir=given.checkpoint.parent) as scratch:
        profile = Trace.open(given.profile)
        bench = Bench(given.checkpoint, profile, fit_path_model(profile), torch.tensor([ids]), Path(scratch))
        deploy(bench.whole, bench.model, CpuBackend())
        outside, blob = weight_bytes(bench.whole), bench.store.layouts.largest
        total = bench.profile.layers * bench.profile.expert_count
        shape = Shape.of(bench.model.config)

        def context(tokens: int, prompt: int) -> int:
            return FLOAT * (shape.kv_per_token * tokens + shape.work_per_token * prompt)

        here = context(PROMPT + TOKENS, PROMPT)
        aimed = [(AIM * bf16 - outside - own) / blob - SPARE for own in (here, context(LONG, LONG))]
        shares = sorted([*SHARES, *(int(slots) / total for slots in aimed)])
        rows = [{"policy": policy, "share": share} for policy in POLICIES for share in shares]
        ratios: list[list[float]] = [[] for _ in rows]
        fresh = measure_costs(bench.layers[0], bench.model.family.moe, bench.store, bench.model)  # type: ignore[arg-type]
        for _ in range(given.rounds):
            for row, seen in zip(rows, ratios, strict=True):
                *how, miss = POLICIES[row["policy"]]  # type: ignore[index]
                plainly = InStep(resident, bench.prompt, bench.text)
                seconds, engine = bench.measured(*how, row["share"], miss, costs=fresh, before=plainly)
                pairs = np.array([seconds, plainly.seconds])[:, TOKENS // 3 :]
                seen += (pairs[0] / pairs[1]).tolist()
                row |= {"ms": 1e3 * float(np.median(pairs[0])), "resident_ms": 1e3 * float(np.median(pairs[1]))}
                fast = outside + engine.arena.bytes + here
                row |= {"slots": engine.policy.slots, "hit_rate": engine.stats()["offload.hit_rate_pairs"]}
                row |= {"fast_tier_bytes": fast, "of_bf16": fast / bf16}
                row |= {"of_bf16_long": (fast - here + context(LONG, LONG)) / bf16}
        for row, seen in zip(rows, ratios, strict=True):
            names = "quartile", "over_resident", "third_quartile"
            row |= dict(zip(names, np.percentile(seen, [25, 50, 75]).tolist(), strict=True))
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    print(f"bf16 {bf16 / 1e6:.1f} MB; outside the experts {outside / 1e6:.1f} MB, context {here / 1e6:.1f} MB")
    if given.figure is not None:
        print(f"figure: {pareto(table, weight_bytes(resident) / bf16, given.figure)}")
    print(json.dumps({"bf16_bytes": bf16, "outside_bytes": outside, "context_bytes": here, "rows": rows}))


def pareto(table: pd.DataFrame, int8: float, path: Path) -> Path:
    """Draw the share of bf16 against the latency over the all-resident model: one line per policy, and the goal."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes: Any = figure.subplots()
    for policy, rows in table.groupby("policy", sort=False):
        middle = rows["over_resident"]
        spread = (middle - rows["quartile"], rows["third_quartile"] - middle)
        axes.errorbar(100 * rows["of_bf16"], middle, spread, marker=".", capsize=2, label=policy)
    axes.plot(100 * int8, 1, "k*", label="int8, all resident")
    axes.axvline(100 * AIM, color="grey", linestyle=":")
    axes.axhline(BOUND, color="grey", linestyle=":")
    axes.set(
        xlabel="fast tier (weights, arena, cache, workspace), % of the bf16 model",
        ylabel="decode latency over all-resident int8's",
        xlim=(15, 60),
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return save(figure, path)


if __name__ == "__main__":
    main()
