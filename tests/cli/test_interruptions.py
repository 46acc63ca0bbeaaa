"""Interruptions and faults of the machine give one message and lose nothing, and the next start resumes.

Faults of one module are tried beside it: a damaged or half-written result (tests/result_cache), a killed checkpoint
(tests/checkpoint/test_resume.py), pickles (tests/models/test_sources.py).
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from children import in_child, killed
from launching import TINY, launch
from safetensors import safe_open

from haq_lab.models.sources import TinyModel
from haq_lab.results.load import load

KEPT = [setting for setting in TINY if not setting.startswith(("result_cache", "measure", "quantizer"))]
KEPT += ["quantizer=haq", "measure=[perplexity,latency]", "measure.latency.seconds=0", "measure.latency.iterations=1"]
KEPT += ["measure.latency.prompt_tokens=8", "measure.latency.decode_tokens=2", "model.layers=1"]
STAGES = {  # what runs within each stage
    "the model is made": "haq_lab.models.sources.build_tiny",
    "sensitivity": "haq_lab.calibration.sensitivity._differentiate_layer",
    "quantization": "haq_lab.pipeline.sequential.quantize_group",
    "assembly": "haq_lab.pipeline.run.Assembly.finish",
    "perplexity": "haq_lab.measure.perplexity.Perplexity.__call__",
    "latency": "haq_lab.measure.latency.Latency.__call__",
    "record": "haq_lab.calibration.channel_ranges.Ranges.save",
}


def _same(one: Path, other: Path) -> bool:
    """Metrics, but for what was timed and for peaks."""
    found = [json.loads((folder / "results.json").read_text())["metrics"] for folder in (one, other)]
    timed = ("time.", "memory.peak", "latency.")
    first, second = ({name: value for name, value in each.items() if not name.startswith(timed)} for each in found)
    return len(first) > 3 and first == second


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C reaches our processes, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert launch(*KEPT, "result_cache.enabled=false", f"hydra.run.dir={folder}").code == 0
    return folder


@pytest.mark.slow
def test_killed_and_interrupted_in_every_stage(undisturbed, tmp_path, monkeypatch):
    """One run after the other in one folder, each ended within a stage that has just done its work: by `kill -9`, then
    by Ctrl-C. The last one finishes with what all of them have left."""
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path / "cache"))
    command = [*KEPT, f"hydra.run.dir={tmp_path / 'run'}"]

    def signalled(stage: str, number: signal.Signals) -> int:
        def work(*given, **named):
            original(*given, **named)
            os.kill(os.getpid(), number)
            time.sleep(1)
            raise AssertionError

        module, _, name = STAGES[stage].rpartition(".")
        original = getattr(pkgutil.resolve_name(module), name)
        with mock.patch(STAGES[stage], work):
            return launch(*command).code

    for stage in STAGES:
        assert killed(in_child(lambda stage=stage: signalled(stage, signal.SIGKILL) and None)), stage
        assert not (tmp_path / "run" / "results.json").exists(), stage
        assert signalled(stage, signal.SIGINT) == 130, stage
        assert not (tmp_path / "run" / "results.json").exists(), stage
    outcome = launch(*command)
    assert outcome.code == 0, outcome.err
    assert _same(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_in_one_message_and_the_same_command_goes_on(tmp_path):
    """As a terminal sends it: to all processes of the sweep."""
    sweep = ["-m", *TINY, "quantizer=rtn,gptq", "model.layers=6", f"hydra.sweep.dir={tmp_path}"]
    command = [sys.executable, "-m", "haq_lab", *sweep]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(tmp_path.glob("*/events.jsonl"))) == 2:  # the second job has begun
                os.killpg(process.pid, signal.SIGINT)
                break
            time.sleep(0.01)
        messages = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT)  # which is 130 to a shell
    assert messages == "haq_lab: interrupted. The same command runs the unfinished runs again.\n"
    assert sorted(load(tmp_path)["status"]) == ["failed", "finished"]
    outcome = launch(*sweep)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("already finished") == 1
    assert list(load(tmp_path)["status"]) == ["finished"] * 2


@pytest.mark.slow
def test_two_sweeps_on_one_cache(undisturbed, tmp_path, monkeypatch):
    """Both start on nothing, and want the same: the model that is made, calibration, baseline, layers."""
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path / "cache"))

    def sweep(name: str) -> None:
        outcome = launch("-m", *KEPT, "quantizer.dampening_frac=0.01,0.02", f"hydra.sweep.dir={tmp_path / name}")
        assert outcome.code == 0, outcome.err

    for child in [in_child(partial(sweep, name)) for name in ("one", "other")]:
        assert not killed(child)
    first, second = (load(tmp_path / name).set_index("config.quantizer.dampening_frac") for name in ("one", "other"))
    for damp in (0.01, 0.02):
        assert _same(Path(first.loc[damp, "folder"]), Path(second.loc[damp, "folder"]))
    assert _same(Path(first.loc[0.01, "folder"]), undisturbed)


# --- disks


FULL: dict[str, Callable[[Path], list[str]]] = {
    "the run folder": lambda disk: ["measure=[perplexity,memory]", f"hydra.run.dir={disk / 'run'}"],
    "the checkpoint": lambda disk: ["quantizer=gptq", f"checkpoint.dir={disk / 'checkpoint'}"],
    "the slow tier": lambda disk: [
        *("model=tiny_mixtral", "offload=lru", "offload.budget=75%", "measure=[latency]", "measure.latency.seconds=0"),
        f"hydra.run.dir={disk / 'run'}",
    ],
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk(what, tmp_path, small_disk):
    command = [*TINY, f"hydra.run.dir={tmp_path / 'run'}", *FULL[what](small_disk)]
    (small_disk / "filler").write_bytes(bytes(240_000 if what == "the run folder" else 150_000))
    outcome = launch(*command)
    assert (outcome.code, "Traceback" in outcome.err) == (2, False), outcome.err
    assert "the disk is full" in outcome.err
    assert str(small_disk) in outcome.err
    assert not list(small_disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=32M", small_disk], check=True)
    outcome = launch(*command)
    assert outcome.code == 0, outcome.err


def test_a_full_cache(tmp_path, small_disk, monkeypatch):
    monkeypatch.setenv("HAQ_LAB_CACHE", str(small_disk))
    outcome = launch(*TINY, f"hydra.run.dir={tmp_path}")
    assert (outcome.code, "Traceback" in outcome.err) == (2, False), outcome.err
    assert re.search(rf"{small_disk / 'models'}/tiny_llama-2x64-0-[0-9a-f]{{8}}: the disk is full", outcome.err)
    assert [path.suffix for path in (small_disk / "models").iterdir()] == [".lock"]


def test_what_wandb_writes_may_fill_the_disk(small_disk, monkeypatch):
    """The results are there by then. (W&B itself would go on to log the full disk when this process ends.)"""

    def fill(**_: object) -> None:
        (small_disk / "log").write_bytes(bytes(300_000))

    monkeypatch.setattr("wandb.init", fill)
    outcome = launch(*TINY, "tracking=offline", f"hydra.run.dir={small_disk / 'run'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert list(load(small_disk)["status"]) == ["finished"]


def test_a_read_only_cache_is_used(undisturbed, tmp_path, read_only, monkeypatch):
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path / "cache"))
    assert launch(*KEPT, f"hydra.run.dir={tmp_path / 'first'}").code == 0
    read_only(tmp_path / "cache")
    outcome = launch(*KEPT, f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert _same(tmp_path / "run", undisturbed)
    outcome = launch(*KEPT, "model.seed=3", f"hydra.run.dir={tmp_path / 'other'}")
    assert outcome.code == 2
    assert "Read-only file system" in outcome.err
    assert str(tmp_path / "cache") in outcome.err


# --- what others give us


def test_weights_outside_the_checkpoint_are_not_read(tmp_path):
    shutil.copytree(TinyModel("llama").folder(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "private.safetensors")
    (tmp_path / "model" / "decoy.safetensors").write_bytes(b"")
    for name in ("../private.safetensors", str(tmp_path / "private.safetensors")):
        with safe_open(tmp_path / "private.safetensors", "pt") as weights:
            index = {"weight_map": dict.fromkeys(weights.keys(), name)}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        outcome = launch(*TINY, "model=hf", f"model.name={tmp_path / 'model'}", f"hydra.run.dir={tmp_path / 'run'}")
        assert outcome.code == 2
        assert f"names '{name}', which lies outside the folder" in outcome.err


@pytest.mark.parametrize("part", ["files", "shards"])
def test_a_manifest_names_nothing_outside_its_folder(part, tmp_path):
    assert launch(*TINY, f"checkpoint.dir={tmp_path / 'checkpoint'}", f"hydra.run.dir={tmp_path / 'run'}").code == 0
    path = tmp_path / "checkpoint" / "manifest.json"
    content = json.loads(path.read_text())
    outside = {"files": {"../private.txt": "0" * 64}, "shards": [content["shards"][0] | {"file": "../private.txt"}]}
    path.write_text(json.dumps(content | {part: outside[part]}))
    (tmp_path / "private.txt").write_text("precious")
    quantized = ["model=quantized", f"model.path={tmp_path / 'checkpoint'}", "quantizer=none"]
    plain = [setting for setting in TINY if not setting.startswith(("model", "quantizer"))]
    again = [*TINY, f"checkpoint.dir={tmp_path / 'checkpoint'}", "force=true"]
    for command in ([*plain, *quantized], again):
        outcome = launch(*command, f"hydra.run.dir={tmp_path / 'other'}")
        assert outcome.code == 2
        assert "names '../private.txt', which is outside the checkpoint" in outcome.err
    assert (tmp_path / "private.txt").read_text() == "precious"


def test_a_config_from_elsewhere_is_no_option(tmp_path):
    outcome = launch(*TINY, "+experiment=/etc/passwd", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert "experiment: '/etc/passwd' is not one of ablation_haq, " in outcome.err


@pytest.mark.parametrize("content", ['{"schema": 1', '{"schema": 1, "run": 3}', "[]", ""])
def test_damaged_results_are_no_results(content, tmp_path):
    command = [*TINY, f"hydra.run.dir={tmp_path}"]
    assert launch(*command).code == 0
    (tmp_path / "results.json").write_text(content)
    assert list(load(tmp_path)["status"]) == ["unfinished"]
    outcome = launch(*command)
    assert (outcome.code, "already finished" in outcome.out) == (0, False), outcome.err
    assert list(load(tmp_path)["status"]) == ["finished"]


# --- places and networks


def test_any_characters_in_any_path(tmp_path, monkeypatch):
    """Cache, store, checkpoint, run folder, the folder that it is started in, and the page about it."""
    from haq_lab.cli import report

    place = tmp_path / "größe ½ 模型 (a,b)=c [1] 'q'"
    place.mkdir()
    monkeypatch.setenv("HAQ_LAB_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)

    def quoted(setting: str, path: Path) -> str:
        return f"{setting}='" + str(path).replace("'", r"\'") + "'"

    store, checkpoint = quoted("result_cache.dir", place / "stages"), quoted("checkpoint.dir", place / "check point")
    outcome = launch(*KEPT, "tracking=offline", store, checkpoint, "hydra.run.dir='one run'")
    assert outcome.code == 0, outcome.err
    plain = [setting for setting in TINY if not setting.startswith(("model", "quantizer"))]
    written = quoted("model.path", place / "check point")
    outcome = launch(*plain, "model=quantized", "quantizer=none", written, "hydra.run.dir='and another'")
    assert outcome.code == 0, outcome.err
    report.main([str(place), "-o", str(place / "réport 1.html")])
    assert "größe" in (place / "réport 1.html").read_text()
    assert {path.name for path in place.iterdir()} == {
        *("cache", "stages", "check point", "one run", "and another", "réport 1.html")
    }


@pytest.mark.slow
def test_no_network(tmp_path):
    """Local models run, W&B does not delay them, and a model that must be downloaded gives one message."""
    alone = ["unshare", "-n"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("a namespace without a network is not allowed here")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    sweep = ["-m", *TINY, "tracking=online", "model=tiny_llama,opt", f"hydra.sweep.dir={tmp_path}"]
    ended = subprocess.run(
        [*alone, sys.executable, "-m", "haq_lab", *sweep], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "model.name: 'facebook/opt-125m' is not a local folder and could not be downloaded" in ended.stderr
    assert sorted(load(tmp_path)["status"]) == ["failed", "finished"]
