"""Run the command line as a user does: results, exit codes, interruptions and sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import TINY, launch

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


# --- results


def test_a_run_writes_all_its_files(tiny_run, tmp_path):
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
    tables = {"latency.csv", "layers.csv", "windows.csv"}
    assert names == {".lock", "config.yaml", "events.jsonl", "figures", "results.json"} | tables
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


def test_a_full_disk_gives_one_message_and_leaves_no_partial_file(tiny_run, tmp_path, monkeypatch):
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


def test_an_interrupted_run_names_the_way_to_resume(tiny_run, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(onepass, "quantize_group", interrupt)
    code, _, err = tiny_run()
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "results.json").exists()


def test_traces_are_shown_on_request(tiny_run, monkeypatch):
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


def test_a_failed_job_does_not_stop_the_others(tmp_path):
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
    assert f"2 runs failed. List all runs with `python -m haq_lab.results {sweep / 'b'}`." in err
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
