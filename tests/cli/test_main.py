"""The command line from the outside: what runs, what is refused and how, what is left on the disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import TINY, launch
from safetensors.torch import load_file, save_file

from haq_lab.cli import main as cli
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline import sequential as onepass


@pytest.fixture
def tiny_run(tmp_path):
    """`tiny_run("quantizer=gptq", ...)` -> exit code, standard output, standard error."""
    return lambda *more, at=tmp_path / "run": launch(*TINY, f"hydra.run.dir={at}", *more)


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def _events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]


# --- what a run leaves


def test_a_run_leaves_a_whole_folder(tiny_run, tmp_path):
    code, out, err = tiny_run("measure=[perplexity,memory,latency]", "measure.latency.seconds=0")
    assert code == 0, err
    assert err == ""
    results = _results(tmp_path / "run")
    assert list(results) == ["schema", "run", "config", "protocol", "metrics"]
    assert results["schema"] == 1
    assert results["run"]["model"] == "tiny_llama"
    assert results["run"]["quantizer"] == "rtn"
    assert results["run"]["kernels"].startswith(("native", "torch"))
    assert results["config"]["quantizer"]["activations"] == "token"
    assert set(results["metrics"]) >= {
        "perplexity.python_docs",
        "perplexity_fp.python_docs",
        "perplexity_smoothed_fp.python_docs",
        "kl.python_docs",
        "token_agreement.python_docs",
        "memory.weights_bytes",
        "memory.weights_fp16_bytes",
        "memory.peak_rss_bytes",
        "memory.peak_device_bytes",
        "latency.prefill_ms",
        "latency.decode_ms_per_token.mean",
        "latency.decode_ms_per_token.p50",
        "latency.decode_ms_per_token.p95",
        "latency.decode_ms_per_token.std",
        "latency.tokens_per_s",
        "quantizer.fallback_modules",
    }
    assert all(isinstance(value, int | float) for value in results["metrics"].values())
    stamp = results["protocol"]["python_docs"]
    assert set(stamp) >= {"tokenizer", "seqlen", "stride", "split", "join", "tokens_scored", "level", "comparable_with"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", "config.yaml", "events.jsonl", "figures", "latency.csv", "layers.csv", "results.json"}
    assert "run folder:" in out


def test_a_finished_run_is_skipped_and_force_repeats_it(tiny_run, tmp_path):
    tiny_run()
    first = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    _, out, _ = tiny_run()
    assert "already finished" in out
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns == first
    code, out, _ = tiny_run("force=true")
    assert code == 0
    assert "already finished" not in out
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns != first


def test_a_changed_config_runs_again_and_keeps_the_old_results(tiny_run, tmp_path):
    tiny_run()
    tiny_run("quantizer.weight_bits=4")
    tiny_run("quantizer.activations=static")  # within the same second: archives do not collide
    assert _results(tmp_path / "run")["config"]["quantizer"]["activations"] == "static"
    archived = sorted((tmp_path / "run" / "previous").iterdir())
    assert [_results(folder)["config"]["quantizer"]["weight_bits"] for folder in archived] == [8, 4]


@pytest.mark.parametrize("name", ["runs of today", "größe/s=½", "a[1],b=c"])
def test_the_run_folder_may_have_any_name(name, tiny_run, tmp_path):
    folder = tmp_path / name
    assert tiny_run(f"hydra.run.dir='{folder}'")[0] == 0
    assert _results(folder)


def test_a_killed_run_leaves_no_results_and_runs_again(tiny_run, tmp_path, cache):
    layers = ["model.layers=12"]
    assert TinyModel("llama", layers=12).folder().is_dir()  # made before, so that the kill falls into the pass
    command = [sys.executable, "-m", "haq_lab", *TINY, *layers, f"hydra.run.dir={tmp_path / 'run'}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "run" / "events.jsonl").exists() and "layer" in _events(tmp_path / "run"):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    code, out, err = tiny_run(*layers)
    assert (code, err) == (0, "")
    assert "already finished" not in out
    assert _events(tmp_path / "run").count("layer") == 12
    assert not list((tmp_path / "run").glob("**/*.part"))


# --- mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("quantizer=smoothqant", "quantizer: 'smoothqant' is not one of .* \\(did you mean 'smoothquant'\\?\\)"),
        ("model=tiny_lama", "model: .*did you mean 'tiny_llama'"),
        ("data=[wikitxt2]", "data: .*did you mean 'wikitext2'"),
        ("measure=[perplexty]", "measure: .*did you mean 'perplexity'"),
        ("+experiment=dmo", "experiment: .*did you mean 'demo'"),
        ("experiment=dmo", "experiment: .*did you mean 'demo'"),
        ("quantizr=rtn", "quantizr: there is no such group or setting \\(did you mean 'quantizer'\\?\\)"),
        ("+experimnt=demo", "experimnt: there is no such group or setting \\(did you mean 'experiment'\\?\\)"),
        ("quantizer.activation=token", "quantizer.activation: .*did you mean 'activations'"),
        ("+quantizer.activation=token", "quantizer.activation: .*did you mean 'activations'"),
        (
            "quantizer.dampening_frac=0.1",
            "quantizer.dampening_frac: only quantizer=gptq, haq has this setting. Choose only from these options, ",
        ),
        ("quantizer.damp=0.1", r"quantizer\.damp: there is no such setting any more\. Use quantizer\.dampening_frac"),
        ("++quantizer.asymmetric=true", r"any more\. Use quantizer\.asymmetric_calibration"),
        ("+objective=kl.c4", r"objective: there is no such setting any more\. Use search_metric"),
        ("stages.use=false", r"stages\.use: there is no such setting any more\. Use result_cache\.enabled"),
        ("quantizer.weight_bits", "quantizer.weight_bits: a value is needed. Write quantizer.weight_bits=VALUE"),
        (
            "data.seqlen=64",
            "data.seqlen: there is no such setting. Write data.OPTION.seqlen, where OPTION is one of c4, ",
        ),
        ("hydra.run.dr=x", "hydra.run.dr: there is no such setting .*did you mean 'dir'"),
        ("hydra/launchr=local", "hydra/launchr: there is no such setting .*did you mean 'launcher'"),
        ("data.pyhton_docs.seqlen=8", "data.pyhton_docs.*did you mean 'python_docs'"),
        ("data.wikitext2.path=x", "data.wikitext2.path: 'wikitext2' is not among the options chosen"),
        ("quantizer.activations=tokn", "quantizer.activations: 'tokn' is not one of .*did you mean 'token'"),
        ("quantizer.activations=auto", "quantizer.activations: 'auto' is not one of token, tensor, static"),
        ("quantizer.weight_bits=5", "quantizer.weight_bits: '5' is not one of 8, 4"),
        ("quantizer.weight_bits=many", "quantizer.weight_bits: 'many' is not one of 8, 4"),
        ("calibration.samples=0", "calibration.samples: '0' is not valid"),
        ("calibration.samples=few", "calibration.samples: 'few' is not valid"),
        ("calibration.inputs=both", "calibration.inputs: 'both' is not one of fp, quantized"),
        ("data.python_docs.windows=0", "data.python_docs.windows: '0' is not valid"),
        ("data.python_docs.seqlen=4096", "data.python_docs.seqlen: 4096 is more than the model's 2048"),
        *([] if torch.cuda.is_available() else [("backend=cuda", "backend=cuda needs an NVIDIA GPU")]),
        ("force=perhaps", "force: 'perhaps' is not one of true, false"),
        ("model=hf", "model.name: a value is needed"),
        ("model=gguf", "model.path: a value is needed"),
        ("checkpoint=/some/where", "checkpoint: '/some/where' is not valid. Name the folder with checkpoint.dir=DIR"),
        ("checkpoint.dirr=x", "did you mean 'checkpoint.dir'"),
        ("+backend.device=cuda", "backend.device: there is no such setting"),
        ("tracking=onlin", "tracking: 'onlin' is not one of .*did you mean 'online'"),
        ("calibration.route=foo", "calibration.route: 'foo' is not one of topk, all"),
        ("offload=lru", "offload: a 'llama' has no experts to offload. Choose offload=none"),
        ("quantizer=null", "a group cannot be null. Choose one of its options, such as quantizer=none."),
        ("quantizer=", "quantizer: '' is not one of"),
        ("data=[wikitext2", "input"),
        ("quantizer._target_=no.such.Quantizer", "quantizer._target_: 'no.such.Quantizer' cannot be imported"),
        ("quantizer._target_=builtins.dict", "quantizer._target_: 'builtins.dict' does not take settings"),
        (
            "quantizer=../model/tiny_opt",
            "quantizer._target_: 'haq_lab.models.sources.TinyModel' is not of the type Quantizer",
        ),
        ("backend._target_=null", "backend._target_: null is not of the type Backend. Choose an option of backend."),
        ("quantizer=rtn,gptq", "quantizer: 'rtn,gptq' is a list of values. Add --multirun to run each of them"),
        ("hydra.run.dir=/proc/nowhere", "/proc/nowhere: "),
    ],
)
def test_a_mistake_is_told_in_one_message(mistake, message, tiny_run):
    code, _, err = tiny_run(mistake)
    assert code == 2
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["model=gguf", "model.path=/no/such.gguf"], "model.path: there is no file '/no/such.gguf'"),
        (["model=quantized", "quantizer=none", "model.path=/no/such"], "model.path: there is no folder '/no/such'"),
        (
            ["model=smol_moe", "model.dense=opt"],
            "model.dense: 'opt' is not a model. Choose one with model@model.dense=OPTION",
        ),
        (["model=hf", "model.name=/no/such/folder"], "model.name: '/no/such/folder' is not a local folder"),
        (["model=tiny_opt", "data=[text]"], "data.text.path: a file is needed"),
        (["model=tiny_opt", "data=[c4]", "data.c4.path=/no/such.jsonl"], "data.c4.path: there is no file"),
    ],
)
def test_missing_files_are_mistakes(mistake, message, tmp_path):
    code, _, err = launch("tracking=none", "quantizer=rtn", f"hydra.run.dir={tmp_path}", *mistake)
    assert code == 2
    assert "Traceback" not in err
    assert message in err


def test_perplexity_of_no_text_is_a_mistake(tmp_path):
    code, _, err = launch("model=tiny_llama", "data=[]", f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert "data: measure=perplexity needs a text. Choose one or more of c4, " in err


def test_nan_weights_are_a_mistake_of_the_checkpoint(tiny_run, tmp_path):
    source = TinyModel("llama").folder()
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][3, 5] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    code, _, err = tiny_run("model=hf", f"model.name={tmp_path}")
    assert code == 2
    assert f"'{name}'" in err
    assert "NaN" in err
    assert json.loads((tmp_path / "run" / "error.json").read_text())["error"]["type"] == "UserError"


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _disk_is_full)
    code, _, err = tiny_run()
    assert code == 2
    assert "the disk is full" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "results.json").exists()
    assert not list(tmp_path.glob("**/*.part"))
    monkeypatch.undo()
    assert tiny_run()[0] == 0


def _disk_is_full(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_an_interrupted_run_says_how_to_go_on(tiny_run, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(onepass, "quantize_group", interrupt)
    code, _, err = tiny_run()
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "results.json").exists()


def test_traces_are_shown_where_they_are_wanted(tiny_run, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, err = tiny_run("quantizer.activations=tokn")
    assert code == 2
    assert "Traceback" in err
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_bug_shows_its_trace_and_exits_with_1(tiny_run, tmp_path):
    code, _, err = tiny_run("quantizer._target_=launching.Broken")
    assert code == 1
    assert "Traceback" in err
    assert "RuntimeError: a bug in a plug-in" in err
    assert json.loads((tmp_path / "run" / "error.json").read_text())["error"]["message"] == "a bug in a plug-in"
    assert "HYDRA_FULL_ERROR" not in os.environ


# --- sweeps


def test_a_sweep_runs_every_job_in_a_folder_named_by_its_overrides(tmp_path):
    sweep = tmp_path / "sweep"
    text = tmp_path / "some words" / "näher.txt"
    text.parent.mkdir()
    text.write_text("".join(f"{number} times {number} is {number * number}. " for number in range(500)))
    code, out, err = launch(
        "-m",
        *[setting for setting in TINY if not setting.startswith(("data", "quantizer="))],
        f"hydra.sweep.dir={sweep}",
        "quantizer=rtn,smoothquant",
        "quantizer.activations=token,static",
        "data=[text]",
        f"data.text.path='{text}'",
        "data.text.seqlen=64",
        "data.text.windows=1",
    )
    assert (code, err) == (0, "")
    folders = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert len(folders) == 4
    for folder in folders:
        assert _results(folder)["run"]["sweep"] == str(sweep)
    for number in range(1, 5):
        assert f"\nrun {number}: " in out


def test_a_failing_job_stops_no_other(tmp_path):
    sweep = tmp_path / "sweep"
    broken = "launching.Broken"
    code, out, err = launch(
        "-m", *TINY, f"hydra.sweep.dir={sweep}", f"quantizer._target_={broken},haq_lab.quantizers.rtn.RTN"
    )
    assert code == 1
    assert "RuntimeError: a bug in a plug-in" in err
    assert sum(1 for _ in sweep.glob("*/results.json")) == 1
    assert sum(1 for _ in sweep.glob("*/error.json")) == 1
    code, out, err = launch("-m", *TINY, f"hydra.sweep.dir={sweep / 'b'}", "quantizer.activations=tokn,tensr,token")
    assert code == 2
    assert "Traceback" not in err
    assert err.count("did you mean") == 2
    assert f"2 runs failed; `python -m haq_lab.results {sweep / 'b'}` lists them" in err
    assert "run 3:" in out


def test_a_sweep_over_the_baseline_too_takes_the_quantizers_settings(tmp_path):
    code, _, err = launch("-m", *TINY, "quantizer=none,rtn", "quantizer.weight_bits=4", f"hydra.sweep.dir={tmp_path}")
    assert code == 0, err
    records = [_results(path.parent) for path in tmp_path.glob("*/results.json")]
    by_option = {record["run"]["quantizer"]: record["config"]["quantizer"] for record in records}
    assert by_option["none"] == {"_target_": None}
    assert by_option["rtn"]["weight_bits"] == 4


def test_a_sweep_is_refused_where_an_option_lacks_a_setting(tmp_path):
    code, _, err = launch(
        "-m", *TINY, "quantizer=rtn,haq", "quantizer.smoothing_strength=0.5", f"hydra.sweep.dir={tmp_path}"
    )
    assert code == 2
    assert "quantizer.smoothing_strength: only quantizer=haq, smoothquant has this setting. Choose only from" in err


def test_flags_may_stand_anywhere(tmp_path):
    code, out, _ = launch(*TINY, "-m", f"hydra.sweep.dir={tmp_path}", "quantizer=rtn,gptq")
    assert code == 0
    assert "run 2:" in out


def test_the_schema_can_be_shown():
    code, out, _ = launch("--cfg", "job", "model=tiny_opt")
    assert code == 0
    assert "architecture: opt" in out


def test_main_restores_the_environment(tiny_run):
    tiny_run("quantizer=nothing")
    assert cli.FULL_ERROR not in os.environ
