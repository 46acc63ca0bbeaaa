"""W&B writes readable files inside the run folder, and a failure of W&B never fails a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from launching import TINY, launch

from haq_lab.cli.wandb_sync import pending_runs
from haq_lab.tracking.run_folder import RunFolder
from haq_lab.tracking.tracker import RunRecord, track_run
from haq_lab.tracking.wandb import Wandb

TRACKED = [setting for setting in TINY if not setting.startswith("tracking")] + ["tracking=offline"]
WANDB = Path(sys.executable).with_name("wandb")


def _records(folder: Path) -> list[dict]:
    log = next(folder.glob("wandb/offline-run-*/run-*.wandb"))
    ended = subprocess.run([WANDB, "leet", "inspect", str(log), "--json"], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_a_sweep_is_one_group_and_stays_inside_its_folders(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    outcome = launch("-m", *TRACKED, f"hydra.sweep.dir={tmp_path / 'sweep'}", "quantizer=rtn,none")
    assert (outcome.code, outcome.err) == (0, "")
    assert not list(home.rglob("*wandb*"))  # matplotlib keeps its fonts there
    assert not list(here.iterdir())
    folders = [path.parent for path in (tmp_path / "sweep").glob("*/results.json")]
    assert len(folders) == 2
    for folder in folders:
        assert "wandb_failed" not in (folder / "events.jsonl").read_text()
        records = _records(folder)
        run = next(record["run"] for record in records if record["type"] == "run")
        assert run["run_group"].endswith("sweep")
        assert "quantizer" in run["config"]["update"]
        assert "perplexity.python_docs" in json.dumps(records)


def test_tables_figures_and_the_checkpoints_manifest_can_be_read_back(tmp_path):
    checkpoint = ["model.layers=1", f"checkpoint.dir='{tmp_path / 'check point'}'"]
    outcome = launch(*TRACKED, *checkpoint, f"hydra.run.dir={tmp_path / 'run'}")
    assert (outcome.code, outcome.err) == (0, "")
    records = _records(tmp_path / "run")
    artifacts = {record["artifact"]["name"]: record["artifact"] for record in records if record["type"] == "artifact"}
    kept = artifacts["checkpoint-check-point"]["manifest"]["contents"][0]
    assert kept["path"] == "manifest.json"
    assert Path(kept["local_path"]).read_text() == (tmp_path / "check point" / "manifest.json").read_text()
    assert (tmp_path / "run") in Path(kept["local_path"]).parents
    logged = next(record["history"]["item"] for record in records if record["type"] == "history")
    assert (logged["layers._type"], logged["figures/layers._type"]) == ("table-file", "image-file")
    files = next((tmp_path / "run").glob("wandb/offline-run-*")) / "files"
    table = json.loads((files / logged["layers.path"]).read_text())
    assert len(table["data"]) == len(pd.read_csv(tmp_path / "run" / "layers.csv"))
    assert (files / logged["figures/layers.path"]).read_bytes().startswith(b"\x89PNG")


def test_a_failing_wandb_fails_no_run(tmp_path, monkeypatch):
    import wandb

    def unreachable(**settings):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", unreachable)
    outcome = launch(*TRACKED, f"hydra.run.dir={tmp_path}")
    assert (outcome.code, outcome.err) == (0, "")
    assert (tmp_path / "results.json").is_file()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "wandb_failed"
    assert "no network" in events[-1]["error"]


def test_tables_figures_and_names_are_cut_to_fit(tmp_path, monkeypatch):
    import wandb

    seen = {}

    class Run:
        def log(self, content):
            seen.update(content)

        def finish(self):
            seen["finished"] = True

    monkeypatch.setattr(wandb, "init", lambda **settings: seen.update(settings) or Run())
    folder = RunFolder(tmp_path, {"a": 1})
    tables = {"experts": pd.DataFrame({"tokens": [3, None]})}
    track_run([Wandb()], folder, RunRecord("n" * 500, None, {"perplexity.x": 2.0}, tables))
    assert len(seen["name"]) == 128
    assert seen["group"] is None
    assert (seen["perplexity.x"], seen["finished"]) == (2.0, True)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """`started("run")` tracks a run, and returns the arguments of `wandb.init` and its environment."""
    import wandb

    def track(name: str, mode: str = "online") -> dict:
        seen = {}
        fake = SimpleNamespace(log=lambda content: None, finish=lambda: None)
        monkeypatch.setattr(wandb, "init", lambda **settings: seen.update(settings, environment={**os.environ}) or fake)
        track_run([Wandb(mode=mode)], RunFolder(tmp_path / name, {}), RunRecord(name, "sweep", {}, {}))
        return seen

    return track


def test_each_run_has_its_own_id_whatever_the_environment_names(started, monkeypatch):
    """As in a sweep with `WANDB_RUN_ID` exported: with one id, uploads would overwrite each other."""
    identity = {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must", "WANDB_RESUME_FROM": "mine?_step=1"}
    for name, value in identity.items():
        monkeypatch.setenv(name, value)
    runs = [started(name) for name in ("one", "two")]
    assert len({run["id"] for run in runs} | {"mine"}) == 3
    assert not identity.keys() & runs[0]["environment"].keys()
    assert {name: os.environ[name] for name in identity} == identity


@pytest.mark.parametrize(
    ("mode", "variables", "used"),
    [
        ("online", {}, "online"),
        ("online", {"WANDB_MODE": "online"}, "online"),
        ("online", {"WANDB_MODE": "offline"}, "offline"),
        ("online", {"WANDB_MODE": "dryrun"}, "offline"),
        ("online", {"WANDB_MODE": "disabled"}, None),
        ("offline", {"WANDB_MODE": "online"}, "offline"),
        ("offline", {"WANDB_MODE": "disabled"}, None),
        ("online", {"WANDB_DISABLED": "true"}, None),
        ("online", {"WANDB_DISABLED": "false"}, "online"),
    ],
)
def test_the_environment_can_only_restrict_the_mode(mode, variables, used, started, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert started("run", mode).get("mode") == used
    assert (tmp_path / "run" / "wandb").exists() == (used is not None)
    assert not (tmp_path / "run" / "events.jsonl").exists()  # no tracker has failed


def test_the_summary_has_ratio_and_interval_and_the_windows_are_a_table(tmp_path):
    outcome = launch(*TRACKED, f"hydra.run.dir={tmp_path / 'run'}")
    assert (outcome.code, outcome.err) == (0, "")
    records = _records(tmp_path / "run")
    logged = next(record["history"]["item"] for record in records if record["type"] == "history")
    ratio = [float(logged[f"perplexity_ratio.python_docs{part}"]) for part in (".low", "", ".high")]
    assert ratio[0] < ratio[1] < ratio[2]
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert ratio[1] == pytest.approx(metrics["perplexity.python_docs"] / metrics["perplexity_fp.python_docs"])
    assert "perplexity_ratio.python_docs.stderr" not in logged
    files = next((tmp_path / "run").glob("wandb/offline-run-*")) / "files"
    table = json.loads((files / logged["windows.path"]).read_text())
    assert len(table["data"]) == len(pd.read_csv(tmp_path / "run" / "windows.csv")) == 2


def _sent(folder: Path) -> str:
    """All that W&B would upload of a run: its records and its files, without where they lie on this machine."""
    records = [record for record in _records(folder) if record["type"] not in ("artifact", "header", "footer")]
    (run,) = folder.glob("wandb/offline-run-*")
    files = [path.read_bytes().decode(errors="replace") for path in (run / "files").rglob("*") if path.is_file()]
    return "\n".join([json.dumps(records), *files])


def test_a_private_run_names_neither_the_machine_nor_paths_nor_settings(tmp_path):
    told = {}
    for name in ("private", "open"):
        folder = tmp_path / "secret-folder" / name
        outcome = launch(*TRACKED, f"tracking.private={name == 'private'}", f"hydra.run.dir={folder}")
        assert (outcome.code, outcome.err) == (0, "")
        assert "wandb_failed" not in (folder / "events.jsonl").read_text()
        told[name] = _sent(folder)
    secrets = [json.dumps(socket.gethostname()), "secret-folder", sys.executable, "calibration", "python_docs.seqlen"]
    assert [secret for secret in secrets if secret in told["private"]] == []
    assert [secret for secret in secrets if secret not in told["open"]] == []  # so the test would find them
    assert "perplexity.python_docs" in told["private"]


def test_a_sweep_is_a_run_of_its_group_with_its_table_and_the_reports_figures(tmp_path):
    sweep = tmp_path / "sweep"
    command = ["-m", *TRACKED, f"hydra.sweep.dir={sweep}", "quantizer=rtn,none"]
    outcome = launch(*command)
    assert (outcome.code, outcome.err) == (0, "")
    assert not (sweep / "events.jsonl").exists()  # nothing has failed
    records = _records(sweep)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert run["display_name"] == "sweep sweep"
    one = next(
        record["run"] for record in _records(next(sweep.glob("*/results.json")).parent) if record["type"] == "run"
    )
    assert run["run_group"] == one["run_group"]
    logged = next(record["history"]["item"] for record in records if record["type"] == "history")
    assert logged["figures/perplexity-by-method._type"] == "plotly-file"
    files = next(sweep.glob("wandb/offline-run-*")) / "files"
    table = json.loads((files / logged["runs.path"]).read_text())
    assert len(table["data"]) == 2
    assert {"name", "quantizer", "perplexity.python_docs", "change_percent.python_docs"} <= set(table["columns"])
    launch(*command)
    assert len(list(sweep.glob("wandb/offline-run-*"))) == 1  # nothing new, so nothing is sent
    assert sorted(pending_runs(sweep)) == sorted(sweep.rglob("offline-run-*"))  # `haq_lab.tracking sync` finds it


def test_a_private_sweep_is_not_sent(tmp_path):
    launch("-m", *TRACKED, "tracking.private=true", f"hydra.sweep.dir={tmp_path}", "quantizer=rtn,none")
    assert len(list(tmp_path.glob("*/wandb"))) == 2
    assert not (tmp_path / "wandb").exists()
