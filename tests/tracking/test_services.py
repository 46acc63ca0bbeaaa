"""MLflow and trackio receive runs, offline: a store and a database in a temporary folder."""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from launching import TINY, launch

UNTRACKED = [setting for setting in TINY if not setting.startswith("tracking")]
SECRETS = ["secret-folder", "data.python_docs.seqlen", sys.executable, getpass.getuser() + "@"]


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the extra '{package}' is not installed")


def _run(tmp_path: Path, *overrides: str) -> Path:
    folder = tmp_path / "secret-folder" / "run"
    outcome = launch(*UNTRACKED, *overrides, f"hydra.run.dir={folder}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "_failed" not in (folder / "events.jsonl").read_text()
    return folder


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch):
    """Runs in an MLflow store of files. Returns the content of all its files after a run."""
    _needs("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server is what MLflow recommends
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")  # so that what the tracker sets is undone

    def run(*overrides: str) -> dict[str, str]:
        store = tmp_path / "store"
        _run(tmp_path, "tracking=mlflow", f"tracking.mlflow.uri='file:{store}'", *overrides)
        files = [path for path in store.rglob("*") if path.is_file()]
        return {str(path.relative_to(store)): path.read_bytes().decode(errors="replace") for path in files}

    return run


def _ending(files: dict[str, str], end: str) -> str:
    return next(text for name, text in files.items() if name.endswith(end))


@pytest.mark.filterwarnings("default")  # MLflow's own
def test_mlflow_has_metrics_settings_tables_and_figures(mlflow_store):
    files = mlflow_store()
    assert float(_ending(files, "metrics/perplexity.python_docs").split()[1]) > 1
    assert float(_ending(files, "metrics/perplexity_ratio.python_docs.high").split()[1]) > 0
    assert _ending(files, "params/calibration.seqlen") == "64"
    assert len(json.loads(_ending(files, "artifacts/tables/windows.json"))["data"]) == 2
    assert any(name.endswith("artifacts/figures/layers.png") for name in files)
    assert "status: 3" in _ending(files, "meta.yaml") or any("status: 3" in text for text in files.values())


@pytest.mark.filterwarnings("default")
def test_mlflow_gets_nothing_private(mlflow_store):
    files = mlflow_store("tracking.private=true")
    sent = "\n".join([*files, *files.values()])
    assert [secret for secret in SECRETS if secret in sent] == []
    assert not any("/params/" in name for name in files)
    assert any(name.endswith("metrics/perplexity.python_docs") for name in files)


def test_mlflow_needs_a_server(tmp_path, monkeypatch):
    _needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    outcome = launch(*UNTRACKED, "tracking=mlflow", f"hydra.run.dir={tmp_path}")
    assert (outcome.code, outcome.err) == (
        2,
        "haq_lab: tracking.mlflow.uri: a value is needed. Name a server or set MLFLOW_TRACKING_URI.\n",
    )


def _trackio(tmp_path: Path, *overrides: str) -> str:
    """Run with trackio in a process of its own, because it reads `TRACKIO_DIR` once; return its database as text."""
    _needs("trackio")
    home = tmp_path / "trackio"
    command = [sys.executable, "-m", "haq_lab", *UNTRACKED, "tracking=trackio", *overrides]
    folder = tmp_path / "secret-folder" / "run"
    environment = {**os.environ, "TRACKIO_DIR": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    told = subprocess.run(
        [*command, f"hydra.run.dir={folder}"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert "_failed" not in (folder / "events.jsonl").read_text()
    assert "* Trackio" not in told.stdout
    rows = []
    for database in home.rglob("*.db"):
        with sqlite3.connect(database) as connection:
            tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
            rows += [str(row) for table in tables for row in connection.execute(f'select * from "{table}"')]
    return "\n".join([*rows, *(str(path.relative_to(home)) for path in home.rglob("*"))])


@pytest.mark.slow
def test_trackio_has_metrics_settings_tables_and_figures(tmp_path):
    recorded = _trackio(tmp_path)
    for name in ("perplexity.python_docs", "perplexity_ratio.python_docs.low", "calibration.seqlen", "figures/layers"):
        assert name in recorded
    assert "windows" in recorded


@pytest.mark.slow
def test_trackio_gets_nothing_private(tmp_path):
    recorded = _trackio(tmp_path, "tracking.private=true")
    assert [secret for secret in SECRETS if secret in recorded] == []
    assert "perplexity.python_docs" in recorded
