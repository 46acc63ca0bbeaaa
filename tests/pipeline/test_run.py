"""Test whole runs whose folder is in use, whose metrics are not finite, or that left saved states behind."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from children import in_child, killed
from launching import TINY, launch
from transformers import AutoModelForCausalLM

from haq_lab.measure.latency import Latency
from haq_lab.measure.perplexity import Perplexity, score_windows, summary
from haq_lab.models.sources import TinyModel
from haq_lab.results.load import load
from haq_lab.tracking.run_folder import RunFolder


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_metric_that_is_not_finite_keeps_the_rest_of_the_run(tmp_path, monkeypatch, value):
    monkeypatch.setattr(
        Perplexity, "__call__", lambda *_: {"perplexity.python_docs": value, "perplexity_fp.python_docs": 5.0}
    )
    command = [*TINY, f"hydra.run.dir={tmp_path}", "search_metric=perplexity.python_docs"]
    for expected in ("run folder", "already finished"):
        done = launch(*command)
        assert done.code == 0, done.err
        assert expected in done.out
        assert "null (" in done.out
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["metrics"]["perplexity.python_docs"] is None
    assert list(results["not_finite"]) == ["perplexity.python_docs"]
    assert (tmp_path / "layers.csv").exists()
    (run,) = load(tmp_path).to_dict("records")
    assert math.isnan(run["perplexity.python_docs"])
    assert math.isnan(run["change_percent.python_docs"])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {"event": "kernels", "used": results["run"]["kernels"]}.items() <= events[1].items()


def test_a_perplexity_beyond_a_double_is_infinite(monkeypatch):
    """A loss of 1,000 nats a token: exp(1000) is larger than 1.8e308."""

    class Certain:
        def head(self, hidden, quantized):
            return torch.tensor([0.0, 1000.0]).expand(1, hidden.shape[1], 2)

    table, _ = score_windows(Certain(), torch.zeros(1, 3, dtype=torch.long), {"fp": torch.zeros(1, 3, 4)})
    assert summary(table, None, "x")["perplexity.x"] == math.inf


def test_a_run_folder_in_use_is_refused(tmp_path):
    ready, begun = os.pipe()
    wait, end = os.pipe()

    def hold() -> None:
        with RunFolder(tmp_path, {}).locked():
            os.write(begun, b"x")
            os.read(wait, 1)

    child = in_child(hold)
    os.read(ready, 1)
    refused = launch(*TINY, f"hydra.run.dir={tmp_path}")
    assert refused.code == 2
    assert f"is in use by process {child} on" in refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "error.json").exists()
    assert not (tmp_path / "events.jsonl").exists()
    os.write(end, b"x")
    assert not killed(child)


def test_a_sweep_in_one_folder_is_refused(tmp_path):
    sweep = ["-m", *TINY, "quantizer.weight_bits=8,4", f"hydra.sweep.dir={tmp_path}"]
    refused = launch(*sweep, "hydra.sweep.subdir=same")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "hydra.sweep.subdir: 'same' is the same for the jobs" in refused.err
    assert not list(tmp_path.glob("*/*"))


def test_an_already_finished_run_removes_the_saved_states_of_a_killed_one(tmp_path, monkeypatch):
    command = [*TINY, "measure=[]", f"hydra.run.dir={tmp_path / 'run'}", f"checkpoint.dir={tmp_path / 'model'}"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert launch(*command).code == 0
    assert (tmp_path / "model" / "work").exists()
    done = launch(*command)
    assert "already finished" in done.out
    assert not (tmp_path / "model" / "work").exists()


AGAINST = ["measure=[latency,perplexity]", "measure.latency.against=none", "measure.latency.prompt_tokens=8"]
AGAINST += ["measure.latency.decode_tokens=2", "measure.latency.seconds=0", "measure.latency.iterations=2"]


@pytest.mark.parametrize("extra", [["quantizer.lm_head=true"], ["quantizer.prefix=[7]"], ["checkpoint.dir={}"], []])
def test_the_reference_is_the_unquantised_model_whatever_the_quantizer_changes(extra, tmp_path, monkeypatch):
    tokens = torch.arange(1, 13)[None]
    found = {}

    def compare(self, study):
        found["hidden"] = dict(study.passed.hidden)
        found["quantized"], found["reference"] = (one(tokens).logits for one in (study.whole, study.reference()))
        return {}

    monkeypatch.setattr(Latency, "__call__", compare)
    extra = [setting.format(tmp_path / "checkpoint") for setting in extra]
    done = launch(*TINY, *AGAINST, *extra, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    expected = AutoModelForCausalLM.from_pretrained(TinyModel("llama").folder())(tokens).logits
    torch.testing.assert_close(found["reference"], expected)
    assert not torch.allclose(found["quantized"], expected, atol=1e-5)
    assert found["hidden"] == {}, "hidden states of the evaluation have left memory"


@pytest.mark.parametrize("quantizer", ["none", "rtn"])
def test_a_run_reports_its_speed_over_full_precision(quantizer, tmp_path):
    done = launch(*TINY, *AGAINST, f"quantizer={quantizer}", f"hydra.run.dir={tmp_path}")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    for phase in ("prefill", "decode"):
        assert metrics[f"latency.speed_vs_fp.{phase}"] > 0
        assert metrics[f"latency.speed_vs_fp.{phase}.stderr"] >= 0
    assert "x fp32" in done.out
    header = (tmp_path / "latency.csv").read_text().splitlines()[0]
    assert header == "phase,repetition,ms,cpu_ms,reference_ms,reference_cpu_ms"
