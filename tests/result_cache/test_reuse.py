"""Test that whole runs have the same bits without the result cache, while filling it, and while using it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from children import in_child, killed
from launching import launch
from safetensors.torch import load_file

from haq_lab.config.help import options

SMALL = ["backend=reference", "tracking=none", "data=[text]", "data.text.seqlen=64", "data.text.windows=2"]
SMALL += ["calibration=text", "calibration.samples=4", "calibration.seqlen=64"]
QUANTIZERS = {
    "rtn": ["quantizer=rtn"],
    "rtn_static": ["quantizer=rtn", "quantizer.activations=static"],
    "smoothquant": ["quantizer=smoothquant"],
    "awq": ["quantizer=awq"],
    "gptq": ["quantizer=gptq", "quantizer.weight_bits=4"],
    "quarot": ["quantizer=quarot", "quantizer.activations=static"],
    "haq": ["quantizer=haq", "quantizer.asymmetric_calibration=true", "quantizer.activations=auto"],
    "none": ["quantizer=none"],
}
DEEP = ["model=tiny_llama", "model.layers=4", "quantizer=gptq", "calibration.inputs=fp", "measure=[perplexity]"]
WHOLE = ("pass", "quantized", "measurement")


@pytest.fixture(scope="module", autouse=True)
def _short_texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Write two short texts, and switch off figures, which are slow."""
    words = random.Random(0).choices([*"abcdefghijk", "stage", "layer", "token "], k=6000)
    folder = tmp_path_factory.mktemp("texts")
    (folder / "evaluation.txt").write_text(" ".join(words[:2000]))
    (folder / "calibration.txt").write_text(" ".join(words[2000:]))
    paths = [f"data.text.path={folder / 'evaluation.txt'}", f"calibration.path={folder / 'calibration.txt'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("haq_lab.results.figures.layer_figure", lambda table, path: path)
        patch.setitem(globals(), "SMALL", SMALL + paths)
        yield


def _run(folder: Path, *settings: str) -> dict:
    """Return the results of a run. Its tables and its trace are in the folder."""
    outcome = launch(*SMALL, *settings, f"hydra.run.dir={folder}")
    assert outcome.code == 0, outcome.err
    return json.loads((folder / "results.json").read_text())


MEASURED = ("time.", "memory.peak", "memory.running", "memory.libraries")  # metrics that no two runs share


def _same(one: Path, other: Path) -> bool:
    """Return whether two runs have the same metrics (except `MEASURED`), reports, ranges and routing."""
    metrics = []
    for folder in (one, other):
        results = json.loads((folder / "results.json").read_text())["metrics"]
        metrics.append({name: value for name, value in results.items() if not name.startswith(MEASURED)})
    tables = [{path.name: path.read_bytes() for path in folder.glob("*.csv")} for folder in (one, other)]
    routings = [load_file(folder / "routing.safetensors") for folder in (one, other) if "experts.csv" in tables[0]]
    routed = not routings or all(torch.equal(tensor, routings[1][name]) for name, tensor in routings[0].items())
    ranges = [
        path.read_bytes() if (path := folder / "ranges.safetensors").exists() else None for folder in (one, other)
    ]
    return metrics[0] == metrics[1] and tables[0] == tables[1] and routed and ranges[0] == ranges[1]


def test_every_quantizer_is_tried():
    assert {settings[0].removeprefix("quantizer=") for settings in QUANTIZERS.values()} == set(options("quantizer"))


@pytest.mark.parametrize(
    ("name", "model", "inputs"),
    [
        *((name, "tiny_mixtral", "fp") for name in QUANTIZERS),
        *((name, "tiny_llama", "fp") for name in ("rtn_static", "smoothquant", "gptq", "haq")),
        *(("haq", model, "quantized") for model in ("tiny_opt", "tiny_mixtral")),
    ],
)
def test_the_same_with_and_without(tmp_path, name, model, inputs):
    settings = [*QUANTIZERS[name], f"model={model}", f"calibration.inputs={inputs}"]
    settings.append("measure=[perplexity,memory]")
    _run(tmp_path / "without", *settings, "result_cache.enabled=false")
    store = tmp_path / "store"
    settings.append(f"result_cache.dir={store}")
    assert _run(tmp_path / "cold", *settings)["run"]["reused"] == []
    reused = _run(tmp_path / "whole", *settings)["run"]["reused"]
    assert any("measurement" in one for one in reused)
    assert any("pass" in one for one in reused) == (name != "none")
    for stage in WHOLE:
        shutil.rmtree(store / stage, ignore_errors=True)
    reused = _run(tmp_path / "parts", *settings)["run"]["reused"]
    assert "1 x baseline" in reused
    assert ("1 x sensitivity" in reused) == (name == "haq")
    calibrated = name not in ("rtn", "none") and inputs == "fp"
    assert any("statistics" in one for one in reused) == calibrated
    for other in ("cold", "whole", "parts"):
        assert _same(tmp_path / "without", tmp_path / other), other


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mixtral"])
def test_quantizers_share_calibration(tmp_path, model):
    settings = [f"model={model}", "calibration.inputs=fp", "measure=[perplexity]"]
    for name in ("smoothquant", "haq", "gptq", "rtn_static"):
        own = [*QUANTIZERS[name], *settings]
        _run(tmp_path / name, *own, "result_cache.enabled=false")
        reused = _run(tmp_path / f"{name}_shared", *own, f"result_cache.dir={tmp_path / 'store'}")["run"]["reused"]
        assert _same(tmp_path / name, tmp_path / f"{name}_shared")
        if name == "rtn_static" or (name == "gptq" and model == "tiny_llama"):
            assert any("statistics" in one for one in reused)


def test_another_model_text_or_setting_is_another_stage(tmp_path):
    settings = ["model=tiny_llama", "quantizer=gptq", "calibration.inputs=fp", "measure=[perplexity]"]
    settings.append(f"result_cache.dir={tmp_path / 'store'}")
    _run(tmp_path / "first", *settings)
    assert _run(tmp_path / "model", *settings, "model.seed=1")["run"]["reused"] == []
    assert _run(tmp_path / "text", *settings, "calibration.seed=1", "data.text.windows=1")["run"]["reused"] == []
    reused = _run(tmp_path / "damp", *settings, "quantizer.dampening_frac=0.02")["run"]["reused"]
    assert not any(stage in one for one in reused for stage in WHOLE)
    assert _run(tmp_path / "seed", *settings, "calibration.seed=2")["run"]["reused"] == ["1 x baseline"]


def test_a_finished_run_stays_finished_with_any_store(tmp_path):
    settings = ["model=tiny_llama", "quantizer=rtn", "measure=[perplexity]", f"hydra.run.dir={tmp_path / 'run'}"]
    assert launch(*SMALL, *settings, f"result_cache.dir={tmp_path / 'a'}").code == 0
    assert "already finished" in launch(*SMALL, *settings, "result_cache.enabled=false").out


def test_layers_are_shared_by_runs_that_offload_differently(tmp_path):
    settings = ["model=tiny_mixtral", "quantizer=rtn", "backend=cpu", "measure=[perplexity,latency]", "offload=lru"]
    settings += ["measure.latency.prompt_tokens=4", "measure.latency.decode_tokens=2", "measure.latency.seconds=0"]
    settings += ["measure.latency.iterations=1", f"result_cache.dir={tmp_path / 'store'}"]
    first = _run(tmp_path / "first", *settings, "offload.budget=4")
    second = _run(tmp_path / "second", *settings, "offload.budget=6")
    assert first["run"]["reused"] == []
    assert "1 x pass" in second["run"]["reused"]
    assert "1 x trace" in second["run"]["reused"]
    assert first["metrics"]["perplexity.text"] == second["metrics"]["perplexity.text"]


def test_the_next_run_uses_the_layers_of_a_killed_one(tmp_path):
    _run(tmp_path / "without", *DEEP, "result_cache.enabled=false")
    settings = [*DEEP, f"result_cache.dir={tmp_path / 'store'}"]
    run = tmp_path / "killed"

    def work() -> None:
        _run(run, *settings)

    assert killed(in_child(work, dies_at=24))
    assert not (run / "results.json").exists()
    reused = _run(run, *settings)["run"]["reused"]
    assert [one for one in reused if "statistics" in one] not in ([], ["8 x statistics"])
    assert _same(run, tmp_path / "without")


def test_two_runs_on_one_store(tmp_path):
    settings = ["model=tiny_mixtral", *QUANTIZERS["haq"], "measure=[perplexity]"]
    settings.append("calibration.inputs=fp")
    _run(tmp_path / "without", *settings, "result_cache.enabled=false")
    settings.append(f"result_cache.dir='{tmp_path / 'one störe'}'")
    children = [in_child(lambda name=name: _run(tmp_path / name, *settings) and None) for name in ("one", "two")]
    for child in children:
        assert not killed(child)
    assert _same(tmp_path / "one", tmp_path / "without")
    assert _same(tmp_path / "two", tmp_path / "without")


def test_a_run_with_a_read_only_store_or_a_full_disk(tmp_path, small_disk, read_only):
    settings = ["model=tiny_llama", "quantizer=haq", "measure=[perplexity]"]
    settings.append("calibration.inputs=fp")
    _run(tmp_path / "without", *settings, "result_cache.enabled=false")
    outcome = launch(*SMALL, *settings, f"result_cache.dir={small_disk}", f"hydra.run.dir={tmp_path / 'full'}")
    assert outcome.code == 0
    assert "nothing more is kept" in outcome.err
    assert _same(tmp_path / "without", tmp_path / "full")
    frozen = tmp_path / "frozen"
    _run(tmp_path / "cold", *settings, f"result_cache.dir={frozen}")
    shutil.rmtree(frozen / "pass")
    shutil.rmtree(frozen / "sensitivity")
    read_only(frozen)
    outcome = launch(*SMALL, *settings, f"result_cache.dir={frozen}", f"hydra.run.dir={tmp_path / 'read'}")
    assert outcome.code == 0
    assert outcome.err.count("cannot be written to") == 1
    assert _same(tmp_path / "without", tmp_path / "read")


def test_a_checkpoint_resumes_with_a_store_and_without(tmp_path):
    """Hidden states lag behind if statistics come from the cache. A resumed run must know by how much."""
    _run(tmp_path / "without", *DEEP, "result_cache.enabled=false")
    filled = f"result_cache.dir={tmp_path / 'store'}"
    _run(tmp_path / "filled", *DEEP, filled)
    for first, second in ((filled, "result_cache.enabled=false"), ("result_cache.enabled=false", filled)):
        run = tmp_path / f"filled_{first == filled}"
        own = [*DEEP, f"checkpoint.dir={run / 'checkpoint'}"]
        assert killed(in_child(lambda own=own, run=run, first=first: _run(run, *own, first) and None, dies_at=25))
        results = _run(run, *own, second)
        assert 0 < results["run"]["resumed_from_layer"] < 4
        results["metrics"].pop("memory.checkpoint_bytes")
        (run / "results.json").write_text(json.dumps(results))
        assert _same(run, tmp_path / "without")


def test_a_users_own_quantizer_is_always_run(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from pydantic.dataclasses import dataclass\nfrom haq_lab.quantizers.rtn import RTN\n\n"
        "@dataclass(frozen=True)\nclass Own(RTN):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = ["model=tiny_llama", "quantizer=rtn", "quantizer._target_=own.Own", "measure=[perplexity]"]
    settings.append(f"result_cache.dir={tmp_path / 'store'}")
    _run(tmp_path / "first", *settings)
    assert _run(tmp_path / "second", *settings)["run"]["reused"] == ["1 x baseline"]
    assert not (tmp_path / "store" / "pass").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("result_cache.max_size=20", "result_cache.max_size: '20' is not a size"),
        ("result_cache.dir=''", "result_cache.dir: '' is not valid"),
        ("result_cache.enabled=maybe", "result_cache.enabled: 'maybe' is not valid"),
        ("+result_cache.size=1", "result_cache.size: there is no such setting"),
        (
            "result_cache.max_sise=1GB",
            "result_cache.max_sise: there is no such setting (did you mean 'result_cache.max_size'?)",
        ),
    ],
)
def test_wrong_settings(setting, message, tmp_path):
    outcome = launch(*SMALL, "model=tiny_llama", setting, f"hydra.run.dir={tmp_path}")
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err
