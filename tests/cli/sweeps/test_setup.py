"""Jobs of a sweep never share a folder, and the same command resumes a search."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
from launching import TINY, launch

from haq_lab.cli.sweeps.setup import SEED

BITS = "quantizer.weight_bits=8,4"
NOTHING = [*(setting for setting in TINY if not setting.startswith("measure")), "measure=[]", "model.layers=1"]


def _sweep(folder: Path, *settings: str) -> tuple[int, str, set[str]]:
    """Return the exit code, the messages and the names of the jobs' folders."""
    outcome = launch("-m", *NOTHING, f"hydra.sweep.dir={folder}", *settings)
    return outcome.code, outcome.err.strip(), {path.parent.name for path in folder.glob("*/results.json")}


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=local", "hydra.launcher.n_jobs=2"]])
@pytest.mark.parametrize(
    ("subdir", "swept"),
    [
        ("run", [BITS]),
        ("${model.layers}", [BITS]),
        ("${quantizer.activations}", [BITS, "quantizer.activations=token,tensor"]),
        ("${quantizer.weight_bits}", [BITS, "quantizer.activations=token,tensor"]),
        ("${hydra.job.name}-${now:%Y}", [BITS]),
        ("${hydra.runtime.choices.model}", ["quantizer=rtn,none"]),
    ],
)
def test_a_folder_for_two_jobs_is_refused(subdir, swept, launcher, tmp_path):
    if launcher and importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        pytest.skip("joblib's launcher is not installed")
    code, message, folders = _sweep(tmp_path, f"hydra.sweep.subdir='{subdir}'", *swept, *launcher)
    assert (code, folders) == (2, set())
    assert message.startswith(f"haq_lab: hydra.sweep.subdir: '{subdir}' is the same for the jobs '")
    assert message.endswith("Remove the setting, or add '${hydra.job.num}'.")
    assert len(message.splitlines()) == 1


def test_the_message_names_two_jobs(tmp_path):
    _, message, _ = _sweep(tmp_path, "hydra.sweep.subdir=run", BITS)
    assert "for the jobs 'quantizer.weight_bits=8' and 'quantizer.weight_bits=4'." in message


@pytest.mark.parametrize(
    ("subdir", "swept", "folders"),
    [
        ("${quantizer.weight_bits}", [BITS], {"8", "4"}),
        ("bits_${hydra.job.num}", [BITS], {"bits_0", "bits_1"}),
        ("bits_${hydra:job.num}", [BITS], {"bits_0", "bits_1"}),
        ("${hydra.runtime.choices.quantizer}", ["quantizer=rtn,none"], {"rtn", "none"}),
        ("run", ["quantizer.weight_bits=4"], {"run"}),  # one job
        ("run", ["quantizer.weight_bits=4,4"], {"run"}),  # twice the same job
    ],
)
def test_a_folder_for_each_job_is_accepted(subdir, swept, folders, tmp_path):
    assert _sweep(tmp_path, f"hydra.sweep.subdir='{subdir}'", *swept) == (0, "", folders)


@pytest.mark.parametrize("swept", ["force=true,false", "result_cache.enabled=true,false", "search_metric=a,b"])
def test_a_sweep_over_a_setting_without_a_folder_is_refused(swept, tmp_path):
    code, message, folders = _sweep(tmp_path, swept)
    name = swept.partition("=")[0]
    assert (code, folders) == (2, set())
    assert message == (
        f"haq_lab: {name}: a sweep over it would run several jobs in one folder, because it does not change the "
        "results. Give it one value."
    )


# --- a search

SEARCH = ["hydra/sweeper=search", "quantizer=smoothquant", "search_metric=perplexity.python_docs", "model.layers=1"]
STRENGTH = "quantizer.smoothing_strength=interval(0.2,0.8)"


@pytest.fixture(scope="module")
def optuna():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old optuna imports deprecated names of SQLAlchemy
        return importlib.import_module("optuna")


@pytest.fixture
def search(tmp_path, optuna):
    """`search("hydra.sweeper.n_trials=3")` -> the strengths of all trials so far, and how many ran just now."""

    def run(*settings: str) -> tuple[list[float], int]:
        outcome = launch("-m", *TINY, *SEARCH, STRENGTH, f"hydra.sweep.dir={tmp_path}", *settings)
        assert outcome.code == 0, outcome.err
        records = [json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")]
        trials = len(re.findall(r"^run \d+:", outcome.out, flags=re.MULTILINE))
        return (
            sorted(record["config"]["quantizer"]["smoothing_strength"] for record in records),
            trials - outcome.out.count("already finished"),
        )

    return run


@pytest.mark.parametrize("sampler", [pytest.param("tpe", marks=pytest.mark.slow), "random"])
def test_the_same_command_resumes_a_search(sampler, search):
    choice = f"hydra/sweeper/sampler={sampler}"
    first, ran = search(choice, "hydra.sweeper.n_trials=2")  # as if the search had been interrupted
    assert (len(first), ran) == (2, 2)
    more, ran = search(choice, "hydra.sweeper.n_trials=3")
    assert (len(more), ran) == (3, 1)
    assert set(first) < set(more)
    assert search(choice, "hydra.sweeper.n_trials=3") == (more, 0)


def test_another_seed_draws_other_trials(search):
    first, _ = search("hydra.sweeper.n_trials=1")
    assert search("hydra.sweeper.n_trials=1", f"hydra.sweeper.sampler.seed={SEED}") == (first, 0)
    assert search("hydra.sweeper.n_trials=1", f"hydra.sweeper.sampler.seed={SEED + 1}")[1] == 1


def test_a_stored_study_gets_the_trials_that_it_lacks(search, optuna, monkeypatch):
    kept = optuna.storages.InMemoryStorage()  # in place of a database
    monkeypatch.setattr("optuna.storages.get_storage", lambda storage: kept)
    study = ["hydra.sweeper.storage='sqlite:///x.db'", "hydra.sweeper.study_name=x"]
    assert search(*study, "hydra.sweeper.n_trials=2")[1] == 2
    assert search(*study, "hydra.sweeper.n_trials=3")[1] == 1
    assert search(*study, "hydra.sweeper.n_trials=3")[1] == 0


def test_a_storage_that_cannot_be_opened_is_explained(optuna, tmp_path):
    storage = "hydra.sweeper.storage='nonsense://x'"
    outcome = launch("-m", *TINY, *SEARCH, STRENGTH, f"hydra.sweep.dir={tmp_path}", storage)
    assert outcome.code == 2
    assert outcome.err.startswith("haq_lab: hydra.sweeper.storage: the search cannot use this storage (")
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_version_that_has_no_working_storage_is_named(optuna, tmp_path, monkeypatch):
    def fail(url):  # as optuna 2 does with SQLAlchemy 2
        raise AssertionError

    monkeypatch.setattr("optuna.storages.RDBStorage", fail)
    storage = f"hydra.sweeper.storage='sqlite:///{tmp_path}/x.db'"
    outcome = launch("-m", *TINY, *SEARCH, STRENGTH, f"hydra.sweep.dir={tmp_path}", storage)
    assert outcome.code == 2
    versions = f"optuna {version('optuna')} does not work with SQLAlchemy {version('SQLAlchemy')}"
    assert outcome.err == (
        f"haq_lab: hydra.sweeper.storage: the search cannot use this storage ({versions}). Run: pip install "
        "'haq-lab[optuna]', or remove it: the same command resumes a search without it too.\n"
    )


def test_a_search_needs_a_folder_for_each_trial(optuna, tmp_path):
    subdir = "hydra.sweep.subdir='${quantizer.activations}'"
    outcome = launch("-m", *TINY, *SEARCH, STRENGTH, f"hydra.sweep.dir={tmp_path}", subdir)
    assert outcome.code == 2
    assert outcome.err.strip() == (
        "haq_lab: hydra.sweep.subdir: '${quantizer.activations}' may give two jobs of a search the same folder. "
        "Remove the setting, or add '${hydra.job.num}'."
    )
