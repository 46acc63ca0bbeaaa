"""Measure how often the interval of one half of a text contains the value of the other half. The last line is JSON.

    python experiments/interval_coverage.py RUN --data wikitext2 --splits 200

RUN is a run folder with `windows.csv`. The windows are split into random halves. `mean` counts the splits in which the
95 % interval from one half contains the other half's value. That value has an error of its own, as large as the
first, so this interval is too narrow for it by a factor sqrt(2): normal errors give 83 %. `difference` counts the
splits in which the interval of the difference of two halves contains zero, and should be 95 %.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from haq_lab.measure.estimate import combined, estimate
from haq_lab.results.windows import windows_of


def coverage(values: NDArray[np.float64], splits: int, rng: np.random.Generator) -> dict[str, float]:
    """Return the share of splits, in which the interval of one half contains the other half.

    Args:
        values: (n,) value of each window.
        splits: Number of random splits. Each is used in both directions.
        rng: Source of the splits.
    """
    contained = {"mean": 0, "difference": 0}
    for _ in range(splits):
        one, other = (estimate(half) for half in np.array_split(rng.permutation(values), 2))
        degrees = len(values) // 2 - 1
        both = combined(one.mean - other.mean, [(one.stderr**2, degrees), (other.stderr**2, degrees)])
        contained["mean"] += (one.low <= other.mean <= one.high) + (other.low <= one.mean <= other.high)
        contained["difference"] += 2 * (both.low <= 0 <= both.high)
    return {name: count / (2 * splits) for name, count in contained.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with windows.csv")
    parser.add_argument("--data", default="wikitext2", help="name of the text")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    table = windows_of(given.run)
    if table is None:
        parser.error(f"{given.run} has no windows.csv. Run it again with measure=[perplexity].")
    table = table[table["data"] == given.data]
    values = {
        "ln(perplexity), full precision": table["nll_fp"],
        "ln(perplexity)": table["nll"],
        "dlnppl": table["nll"] - table["nll_fp"],
        "kl": table["kl"],
        "token_agreement": table["token_agreement"],
    }
    shares = {
        name: coverage(column.to_numpy(float), given.splits, np.random.default_rng(given.seed))
        for name, column in values.items()
    }
    for name, share in shares.items():
        print(f"{name:32} mean {share['mean']:.1%}  difference {share['difference']:.1%}")
    print(json.dumps({"windows": len(table), "splits": given.splits, "coverage": shares}))


if __name__ == "__main__":
    main()
