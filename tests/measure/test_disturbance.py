"""A latency is marked if other work disturbed it, and the reasons are given."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from haq_lab.measure.disturbance import advice, disturbances, mark

QUIET = {"latency.wall_over_cpu": 1.02, "latency.spread": 0.1, "latency.machine.others_share": 0.05}


@pytest.mark.parametrize(
    ("name", "limit", "beyond", "reason"),
    [
        ("latency.wall_over_cpu", 1.05, 1.384, "wall time exceeds processor time by 38 %"),
        ("latency.spread", 0.25, 0.6, "5 % of the tokens take 60 % longer than the median, or more"),
        ("latency.machine.others_share", 0.1, 0.45, "others used 45 % of the processors"),
        ("latency.machine.throttled", 0.0, 3.0, "cores were slowed 3 times because of heat"),
    ],
)
def test_each_limit_has_its_reason(name, limit, beyond, reason):
    assert disturbances(QUIET | {name: limit}) == []
    assert disturbances(QUIET | {name: beyond}) == [reason]
    assert disturbances(pd.Series(QUIET | {name: beyond, "model": "smol"})) == [reason]


def test_runs_of_older_versions_and_other_runs_are_not_marked():
    assert disturbances({"latency.prefill_ms": 12.0}) == []
    assert disturbances(dict.fromkeys(QUIET, math.nan)) == []
    assert disturbances(dict.fromkeys(QUIET)) == []
    assert advice({"perplexity.c4": 20.0}) == ""


def test_only_times_are_marked():
    busy = QUIET | {"latency.wall_over_cpu": 1.5}
    assert mark("latency.prefill_ms", busy) == mark("latency.decode_ms_per_token.p95", busy) == "~"
    assert mark("latency.tokens_per_s", busy) == "~"
    assert mark("perplexity.c4", busy) == mark("latency.spread", busy) == mark("latency.threads", busy) == ""
    assert mark("latency.prefill_ms", QUIET) == ""


def test_a_ratio_holds_under_load_only_when_one_thread_decodes():
    """With two threads, the ratio of decoding was 7.4 instead of 4.2 (experiments/latency_under_load.md)."""
    busy = QUIET | {"latency.wall_over_cpu": 1.5}
    for threads, shown in ((1.0, ""), (2.0, "~"), (math.nan, "~")):
        assert mark("latency.speed_vs_fp.decode", busy | {"latency.threads": threads}) == shown
        assert mark("latency.speed_vs_fp.prefill", busy | {"latency.threads": threads}) == "~"
    assert mark("latency.speed_vs_fp.decode", QUIET | {"latency.threads": 2.0}) == ""


def test_the_advice_names_what_was_not_tried():
    busy = QUIET | {"latency.wall_over_cpu": 1.5, "latency.machine.others_share": 0.5}
    assert advice(busy) == (
        "~ the machine was busy when latency was measured: wall time exceeds processor time by 50 %, and others used "
        "50 % of the processors. measure.latency.wait=60 waits for a quiet moment. measure.latency.against=none gives "
        "a ratio of decoding, which holds with OMP_NUM_THREADS=1."
    )
    ratio = busy | {"latency.speed_vs_fp.decode": 3.0}
    assert advice(ratio).endswith("With OMP_NUM_THREADS=1 the ratio of decoding holds on a busy machine.")
    assert advice(ratio | {"latency.threads": 1.0}).endswith("waits for a quiet moment.")
    assert "wait=60" not in advice(busy | {"latency.machine.waited_s": 60.0})
    assert "against" in advice(pd.Series(busy | {"latency.speed_vs_fp.decode": math.nan}))
