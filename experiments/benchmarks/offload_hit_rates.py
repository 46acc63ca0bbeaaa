"""Compare the hit rates of all policies on held-out text with LRU, LFU and Belady's bound.

It uses routing only: no weights and no GPU.

    python experiments/benchmarks/offload_hit_rates.py --profile A.trace --test B.trace [--budgets 0.25 0.5]

Traces come from `python -m haq_lab.offload trace`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from haq_lab.offload.simulate.hit_rate_curves import closed, hit_rates
from haq_lab.routing.trace import Trace


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    given = parser.parse_args()
    profile, test = Trace.open(given.profile), Trace.open(given.test)
    table = hit_rates(profile, test, given.budgets)
    print(table.pivot(index="policy", columns="budget", values="pairs").round(4).to_string())
    print(table.pivot(index="policy", columns="budget", values="layer_std").round(4).to_string())
    result = {"profile": profile.text, "test": test.text, "model": test.model, "tokens": test.tokens}
    print(json.dumps(result | {"closed": closed(table), "rates": table.round(5).to_dict("records")}))


if __name__ == "__main__":
    main()
