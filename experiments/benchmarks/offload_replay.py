"""Measure how fast each eviction rule replays a trace of a million tokens with half of the experts resident.

    python experiments/benchmarks/offload_replay.py [--tokens 1000000]

The last line is JSON: seconds by rule without compilation, in wall time and processor time. The trace has 32 layers
with top 2 of 8 experts. It is synthetic. Its tokens are of several kinds that prefer different experts, so the shares
of hits and misses are realistic.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from haq_lab.offload.policies.path_model import fit_path_model
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.routing.trace import Trace

LAYERS, EXPERTS, K, KINDS = 32, 8, 2, 64


def synthetic(tokens: int, seed: int) -> Trace:
    """Return a trace with tokens of `KINDS` kinds. Each kind has a few paths."""
    rng = np.random.default_rng(0)
    taste = rng.gumbel(size=(KINDS, 1, LAYERS, EXPERTS)) * 1.5 + rng.gumbel(size=(KINDS, 16, LAYERS, EXPERTS))
    paths = np.argsort(-taste, -1)[..., :K].astype(np.uint8)  # (kinds, variants, layers, k)
    rng = np.random.default_rng(seed)
    kinds = rng.zipf(1.3, tokens) % KINDS
    experts = paths[kinds, rng.integers(0, 16, tokens)]
    weights = np.full(experts.shape, 0.5, np.float16)
    starts = np.arange(0, tokens, 4096)
    return Trace(experts, weights, np.ones(tokens, np.bool_), starts, EXPERTS, "synthetic", "synthetic")


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    given = parser.parse_args()
    profile, test = synthetic(8192, 1), synthetic(given.tokens, 2)
    model = fit_path_model(profile)
    seconds, processor = {}, {}
    for rule in ("none", "lru", "lfu", "moe_infinity", "haq", "belady"):
        small = test.part(slice(0, 1))
        make_policy(rule, place("frequency", profile, 128), small, "global", model).replay(small)  # compiles
        policy = make_policy(
            rule, place("frequency", profile, 128), test if rule == "belady" else profile, "global", model
        )
        start, busy = time.perf_counter(), time.process_time()
        rates = policy.replay(test)
        seconds[rule], processor[rule] = time.perf_counter() - start, time.process_time() - busy
        print(
            f"{rule:<14}{seconds[rule]:8.2f} s, processor {processor[rule]:8.2f} s, hit rate {rates.pairs:.4f}",
            flush=True,
        )
    print(json.dumps({"tokens": test.tokens, "layers": LAYERS, "seconds": seconds, "processor_s": processor}))


if __name__ == "__main__":
    main()
