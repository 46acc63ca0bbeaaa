"""Run small sweeps with each launcher, and a search. A failed job does not stop the others, and sets the exit code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from launching import TINY, Outcome, apart, launch

from haq_lab.cli.sweeps.failures import Watch, new_failures

LAUNCHERS = {
    "joblib": ["hydra/launcher=local", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=cluster", "+hydra.launcher.ray.init.num_cpus=2"],
}


def _needs(plugin: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}") is None:
        extra = plugin.split("_")[0]
        pytest.skip(f"the extra '{extra}' is not installed: pip install 'haq-lab[{extra}]'")


def _sweep(folder: Path, *settings: str) -> Outcome:
    return apart("-m", *TINY, f"hydra.sweep.dir={folder}", *settings)


@pytest.mark.parametrize(
    "launcher", ["joblib", *(pytest.param(name, marks=pytest.mark.slow) for name in ("submitit", "ray"))]
)
def test_a_sweep_through(launcher, tmp_path):
    _needs(f"{launcher}_launcher")
    settings = [*LAUNCHERS[launcher], "quantizer.weight_bits=8,3"]
    done = _sweep(tmp_path, *settings)
    assert done.code == 2, done.err
    (failed,) = tmp_path.glob("*/error.json")
    (finished,) = tmp_path.glob("*/results.json")
    assert f"{failed.parent}: quantizer.weight_bits: '3' is not one of 8, 4" in done.err
    assert "Traceback" not in done.err
    assert "metrics" in json.loads(finished.read_text())
    assert "quantizer.weight_bits: '3'" in json.loads(failed.read_text())["error"]["message"]


def test_a_sweep_names_its_jobs_by_what_differs_and_prints_a_message_once(tmp_path):
    sweep = ["-m", *TINY[2:], f"hydra.sweep.dir={tmp_path}", "model=tiny_llama", "quantizer=rtn,gptq"]
    done = launch(*sweep, "calibration.path=text.txt")
    assert done.code == 2
    assert done.out.split("\n") == ["", "run 1: quantizer=rtn", "", "run 2: quantizer=gptq", ""]
    message, again, last = done.err.splitlines()
    assert message.startswith("haq_lab: calibration.path: python_docs has no file")
    assert again == "haq_lab: the same message as above."
    assert last.startswith("haq_lab: 2 runs failed.")


@pytest.mark.slow
def test_running_it_again_runs_what_is_missing(tmp_path):
    """With a launcher of other processes: what failed runs again, what is finished stays."""
    _needs("joblib_launcher")
    launcher = ["hydra/launcher=local", "hydra.launcher.n_jobs=2"]
    assert launch(*TINY, "-m", f"hydra.sweep.dir={tmp_path}", "quantizer.weight_bits=8,3").code == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    again = _sweep(tmp_path, *launcher, "quantizer.weight_bits=8,3,4")
    assert again.code == 2, again.err
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert len(after) == 3
    assert {path.name for path in before if after[path] == before[path]} == {"results.json"}


@pytest.mark.slow
def test_a_search(tmp_path):
    _needs("optuna_sweeper")
    search = ["hydra/sweeper=search", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1"]
    model = ["quantizer=haq", "quantizer.adaptive=false", "quantizer.sensitivity=0", "calibration.inputs=fp"]
    wanted = ["search_metric=perplexity.python_docs", "quantizer.smoothing_strength=interval(0.2,0.8)"]
    done = _sweep(tmp_path, *search, *model, *wanted)
    assert done.code == 0, done.err
    found = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    values = [
        json.loads(path.read_text())["metrics"]["perplexity.python_docs"] for path in tmp_path.glob("*/results.json")
    ]
    assert len(values) == 3
    assert found["best_value"] == min(values)
    done = _sweep(tmp_path / "wrong", *search, *model, *wanted[1:], "search_metric=perplexity.python_doc")
    assert done.code == 2
    assert "search_metric: 'perplexity.python_doc' is not one of" in done.err
    assert "did you mean 'perplexity.python_docs'?" in done.err


def test_the_objective_is_no_part_of_a_runs_identity(tmp_path):
    where = f"hydra.run.dir={tmp_path}"
    assert launch(*TINY, where).code == 0
    assert "already finished" in launch(*TINY, where, "search_metric=perplexity.python_docs").out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("hydra/launcher=locl", "hydra/launcher: 'locl' is not one of cluster, local, slurm (did you mean 'local'?)"),
        ("hydra/sweeper=serch", "hydra/sweeper: 'serch' is not one of search (did you mean 'search'?)"),
    ],
)
def test_mistakes(setting, message):
    outcome = launch("-m", *TINY, setting)
    assert outcome.code == 2
    assert message in outcome.err


def test_without_slurm_its_launcher_says_so(tmp_path, monkeypatch):
    _needs("submitit_launcher")
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun, whichever machine this is
    outcome = launch("-m", *TINY, "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}")
    assert outcome.code == 2
    assert outcome.err.strip() == (
        "haq_lab: hydra/launcher=slurm: this machine has no SLURM, because `srun` is not on the PATH. "
        "Choose hydra/launcher=local."
    )


@pytest.mark.parametrize(
    ("error", "extra"),
    [
        ("Unknown plugin class : 'hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher'", "ray"),
        ("Unknown plugin class : 'hydra_plugins.hydra_submitit_launcher.x.LocalLauncher'", "submitit"),
        ("Could not load 'hydra/launcher/joblib'.", "joblib"),
        ("In 'hydra/sweeper/search': Could not load 'hydra/sweeper/optuna'.", "optuna"),
    ],
)
def test_a_missing_extra_is_named(error, extra):
    from haq_lab.config.explain import explain

    assert explain(RuntimeError(error)) == f"hydra: {extra} is not installed. Run: pip install 'haq-lab[{extra}]'"


def test_only_new_failures_count(tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "folder", None)
    assert new_failures() == {}
    for name in ("old", "again"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "error.json").write_text(json.dumps({"schema": 1, "error": {"message": name}}))
    monkeypatch.setattr(Watch, "before", {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/error.json")})
    monkeypatch.setattr(Watch, "folder", tmp_path)
    assert new_failures() == {}
    (tmp_path / "again" / "error.json").unlink()
    (tmp_path / "again" / "error.json").write_text(json.dumps({"schema": 1, "error": {"message": "anew"}}))
    assert new_failures() == {tmp_path / "again": {"message": "anew"}}
