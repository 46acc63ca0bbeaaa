"""Which runs share the mark of the best."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from haq_lab.measure.metrics import Metric, find_metric
from haq_lab.report.verdicts import best_runs, verdict

BASE = [0.010, 0.013, 0.011, 0.012, 0.010, 0.012, 0.011, 0.013, 0.012, 0.010]
RUNS = {
    "haq": BASE,
    "gptq": [kl * 1.002 * (1 + (-1) ** i / 50) for i, kl in enumerate(BASE)],
    "rtn": [3 * kl for kl in BASE],
}

KL = Metric("KL", direction="lower")


@pytest.fixture
def runs(tmp_path) -> pd.DataFrame:
    """Three runs of ten windows. HAQ and GPTQ differ by noise, and RTN is worse."""
    stamp = {"text_sha256": "a", "seqlen": 8}
    rows = []
    for name, kl in RUNS.items():
        folder = Path(tmp_path / name)
        folder.mkdir()
        agreement = [1 - 3 * value for value in kl]
        windows = {"data": "text", "window": range(10), "document": range(10), "nll_fp": 2.0, "nll": 2.1, "kl": kl}
        windows["token_agreement"] = agreement
        pd.DataFrame(windows).to_csv(folder / "windows.csv", index=False)
        (folder / "results.json").write_text(json.dumps({"schema": 1, "protocol": {"text": stamp}}))
        values = {"kl.text": sum(kl) / 10, "token_agreement.text": sum(agreement) / 10}
        rows.append({"name": name, "folder": str(folder), "memory.weights_bytes": 1e6 * len(name), **values})
    return pd.DataFrame(rows)


def test_runs_that_cannot_be_told_apart_share_the_mark(runs):
    for name in ("kl.text", "token_agreement.text"):
        metric = find_metric(name)
        assert metric is not None
        assert best_runs(runs, name, metric) == {"haq", "gptq"}
    assert (
        verdict("text", 3, best_runs(runs, "kl.text", KL))
        == "On text, the KL divergence of gptq and haq is lower than that of the others beyond noise."
    )


def test_runs_that_are_printed_alike_share_the_mark_even_if_they_differ_beyond_noise(runs):
    assert best_runs(runs, "kl.text", Metric("KL", direction="lower", decimals=5)) == {"haq", "gptq"}
    for place, name in enumerate(("haq", "gptq", "rtn")):
        path = Path(runs["folder"][place]) / "windows.csv"
        windows = pd.read_csv(path)
        windows["kl"] = [kl + {"haq": 0, "gptq": 1e-6, "rtn": 0.01}[name] for kl in BASE]
        windows.to_csv(path, index=False)
    runs["kl.text"] = [sum(BASE) / 10 + extra for extra in (0, 1e-6, 0.01)]
    assert best_runs(runs, "kl.text", Metric("KL", direction="lower", decimals=7)) == {"haq"}
    assert best_runs(runs, "kl.text", Metric("KL", direction="lower", decimals=4)) == {"haq", "gptq"}


def test_no_run_is_marked_if_none_is_worse(runs):
    near = runs[runs["name"] != "rtn"]
    assert best_runs(near, "kl.text", KL) == set()
    assert verdict("text", 2, best_runs(near, "kl.text", KL)).startswith(
        "On text, the KL divergences of the 2 runs cannot be told apart"
    )


def test_a_table_of_older_runs_compares_what_it_shows(runs):
    for folder in runs["folder"]:
        (Path(folder) / "windows.csv").unlink()
    assert best_runs(runs, "kl.text", Metric("KL", direction="lower", decimals=3)) == {"haq", "gptq"}


@pytest.mark.parametrize(("direction", "best"), [("lower", {"haq", "rtn"}), ("higher", {"gptq"}), ("", set())])
def test_other_metrics_tie_if_they_look_alike(runs, direction, best):
    metric = Metric("weights", "MB", direction, 1, 1e-6)
    assert best_runs(runs, "memory.weights_bytes", metric) == best
    assert best_runs(runs[runs["name"] != "gptq"], "memory.weights_bytes", metric) == set()


def test_one_run_has_no_verdict(runs):
    assert verdict("text", 1, set()) == ""
