"""Runs are named in words, in the order of the paper."""

from __future__ import annotations

import pandas as pd
import pytest

from haq_lab.results.load import load
from haq_lab.results.run_labels import LONGEST, with_labels
from haq_lab.tracking.run_folder import RunFolder


def row(quantizer: str, *overrides: str, activations: str = "token", **more) -> dict:
    own = {"folder": f"runs/{quantizer}", "model": "m", "quantizer": quantizer, "quantized": quantizer != "none"}
    own |= {"config.quantizer.activations": activations, "overrides": " ".join((f"quantizer={quantizer}", *overrides))}
    return own | more


def labels(*rows: dict) -> list[str]:
    return list(with_labels(pd.DataFrame(rows))["label"])


def test_methods_have_the_order_of_the_paper():
    rows = [row(name) for name in ("haq", "gptq", "mine", "quarot", "rtn", "none", "awq", "smoothquant")]
    assert labels(*rows) == ["full precision", "RTN", "SmoothQuant", "GPTQ", "AWQ", "QuaRot", "mine", "HAQ"]


def test_schemes_are_named_if_one_is_not_per_token():
    rows = [
        row(name, f"quantizer.activations={scheme}", activations=scheme)
        for scheme in ("static", "token")
        for name in ("haq", "none", "rtn")
    ]
    assert labels(*rows) == [
        *("full precision", "full precision"),
        *("RTN, per token", "HAQ, per token", "RTN, static", "HAQ, static"),
    ]
    assert labels(row("rtn"), row("haq")) == ["RTN", "HAQ"]


def test_other_differences_are_words():
    rows = [
        row("haq", "calibration.seed=0", "quantizer.weight_bits=4", "quantizer.act_order=true", "tracking=none"),
        row("haq", "calibration.seed=1", "quantizer.weight_bits=8", "quantizer.act_order=false", "data=[c4]"),
        row("none", "calibration.seed=1", "quantizer.weight_bits=8"),
    ]
    assert labels(*rows) == [
        "full precision",
        "HAQ, seed 0, 4-bit weights, act order",
        "HAQ, seed 1, 8-bit weights, no act order, data c4",
    ]
    assert labels(rows[0]) == ["HAQ"]  # one run differs from no other


def test_a_failed_attempt_does_not_make_other_names_longer():
    failed = row("haq", "quantizer.fold=[norm]", status="failed", folder="failed")
    assert labels(row("rtn", status="finished"), row("haq", status="finished"), failed) == [
        "RTN",
        "HAQ",
        "HAQ, fold norm",
    ]


def test_a_long_label_is_cut():
    rows = [row("haq", f"quantizer.prefix={'x' * 100}{number}") for number in range(2)]
    assert all(len(label) <= LONGEST + 3 for label in labels(*rows))


def test_a_checkpoint_is_not_full_precision():
    assert labels(row("none") | {"quantized": True}) == ["checkpoint"]


def test_an_unfinished_run_has_a_short_name_of_the_same_form(tmp_path):
    for name, model in (("model=a,quantizer=rtn,quantizer.fold=[norm,value]", "A"), ("model=a,quantizer=haq", None)):
        folder = RunFolder(tmp_path / name, {})
        folder.begin("a: 1\n")
        if model:
            folder.finish({"model": model, "quantizer": "rtn", "overrides": name.split(",")[:2]}, {}, {})
    RunFolder(tmp_path / "my run", {}).begin("a: 1\n")
    runs = with_labels(load(tmp_path)).set_index("label")
    assert list(runs.index) == ["my run", "RTN", "HAQ"]
    assert runs["of"].to_dict() == {"my run": "", "RTN": "A", "HAQ": "A"}


def test_no_runs_are_no_mistake():
    assert with_labels(pd.DataFrame(columns=["folder", "name"])).empty


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_runs_without_a_record_have_a_method(missing):
    run = {"folder": "a/quantizer=gptq", "model": missing, "quantizer": missing, "overrides": ""}
    assert labels(run) == ["GPTQ"]
