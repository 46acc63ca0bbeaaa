"""What a run keeps of the layers, and what it asks of the calibration text, follow from what is measured."""

from __future__ import annotations

import json

from launching import TINY, launch

from haq_lab.offload import session
from haq_lab.offload.tiers.disk import PAGE
from haq_lab.pipeline import deployment

MIXTRAL = [*TINY, "model=tiny_mixtral", "measure=[memory]"]
OFFLOADED = ["offload=static", "offload.budget=8"]


def _run(folder, *more):
    code, _, err = launch(*MIXTRAL, f"hydra.run.dir={folder}", *more)
    assert code == 0, err
    return json.loads((folder / "results.json").read_text())


def test_calibration_text_is_read_for_offloading_only_where_no_trace_is_there(tmp_path):
    calibrated = _run(tmp_path / "first", "quantizer=gptq")
    assert "calibration" in calibrated["protocol"]
    assert "calibration" in _run(tmp_path / "traced", *OFFLOADED)["protocol"]
    profile = f"offload.profile={tmp_path / 'first' / 'routing.safetensors'}"
    elsewhere = ["calibration=wikitext2", "calibration.path=/no/such.txt"]
    assert "calibration" not in _run(tmp_path / "given", *OFFLOADED, profile, *elsewhere)["protocol"]


def test_a_run_without_the_native_decoder_says_so_once(tmp_path):
    code, out, err = launch(*MIXTRAL, "backend=reference", f"hydra.run.dir={tmp_path}")
    assert code == 0, err
    notice = "native decoder not used: backend=reference does not use the native CPU kernels"
    assert out.count("native decoder") == out.count(notice) == 1
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["text"] for event in events if event["event"] == "notice"] == [notice]


def test_another_run_in_the_same_folder_leaves_no_table_of_the_first(tmp_path):
    assert any(name.startswith("offload.") for name in _run(tmp_path, *OFFLOADED)["metrics"])
    assert (tmp_path / "offload.csv").is_file()
    assert not (tmp_path / "experts.bin").exists()
    assert not any(name.startswith("offload.") for name in _run(tmp_path)["metrics"])
    assert not (tmp_path / "offload.csv").exists()


def test_resident_experts_are_held_once(tmp_path):
    """The budget is a bound on memory: what is resident lies in the engine's arena and nowhere else."""
    everything = _run(tmp_path / "none", "backend=cpu")["metrics"]["memory.weights_bytes"]
    metrics = _run(tmp_path / "static", "backend=cpu", *OFFLOADED)["metrics"]
    arena = metrics["offload.fast_tier_bytes"]  # 8 residents and 4 spare slots of 16 experts
    pages = 16 * PAGE  # an expert takes whole ones there: less than 4 of the 8 residents held twice would be
    assert abs(metrics["memory.weights_bytes"] - (everything - arena * 16 / 12 + arena)) < pages < arena / 12 * 4


def test_layers_are_kept_only_for_measures_that_deploy(tmp_path):
    metrics = _run(tmp_path, *OFFLOADED, "measure=[perplexity]")["metrics"]
    assert not any(name.startswith("offload.") for name in metrics)


def test_a_trace_is_recorded_before_the_model_leaves_for_its_device(tmp_path, monkeypatch):
    """Recording runs the full-precision model on the CPU; deploying takes what lies outside the layers away."""
    steps = []

    def noting(function, step):
        return lambda *arguments: steps.append(step) or function(*arguments)

    monkeypatch.setattr(deployment, "deploy", noting(deployment.deploy, "deploy"))
    monkeypatch.setattr(session, "routing_trace", noting(session.routing_trace, "record"))
    _run(tmp_path, *OFFLOADED)
    assert steps == ["record", "deploy"]
