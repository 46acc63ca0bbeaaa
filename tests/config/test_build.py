"""Every option composes, and every combination that this machine can run runs on a tiny model."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from launching import TINY, launch
from pydantic.dataclasses import dataclass

from haq_lab.config.build import build
from haq_lab.config.help import GROUPS, options, settings_of
from haq_lab.hardware.local import save_local
from haq_lab.hardware.spec import load_hardware
from haq_lab.quantizers.rtn import RTN
from haq_lab.results.load import load
from haq_lab.results.published import beside
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import bundled

QUANTIZERS = [name for name in options("quantizer") if name != "none"]
NEEDED = {
    "model=hf": ["model.name=x"],
    "model=tiny": ["model.architecture=qwen2"],
    "tracking=mlflow": ["tracking.mlflow.uri=sqlite:///runs.db"],
    "model=gguf": ["model.path=x"],
    "model=quantized": ["model.path=x", "quantizer=none"],
}
NEEDED |= {f"hardware={name}": ["offload=haq"] for name in options("hardware")}
ONE_CHOICE = [f"{group}={option}" for group in GROUPS if group not in ("experiment",) for option in options(group)]


def _composed(*overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(bundled("conf").resolve()), version_base="1.3"):
        return compose("config", [*overrides])


@pytest.mark.parametrize("choice", ONE_CHOICE)
def test_every_option_makes_its_object(choice, tmp_path, monkeypatch):
    if choice == "backend=cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU; test_cli has the refusal")
    if choice == "hardware=local":  # test_hardware has the refusal before this machine was measured
        monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path))
        save_local(replace(load_hardware("rtx3090"), from_disk=True))
    build(_composed(choice, *NEEDED.get(choice, [])))


SPELLINGS = [
    "model=smol",
    "model=opt model.name=facebook/opt-125m",
    "model=hf model.name=some/model model.revision=main",
    "model=gguf model.path=file.gguf",
    "model=smol_moe model.experts=4 model.active=1 model.seed=1",
    "model=smol_moe model@model.dense=tiny_llama",
    "model=tiny_mixtral_trained model.steps=10",
    "model=mixtral model.name=/a/folder",
    "model=quantized model.path=folder quantizer=none",
    "checkpoint.dir=folder",
    "quantizer=haq quantizer.activations=auto",
    "quantizer=haq quantizer.adaptive=false quantizer.smoothing_strength=0.5",
    "quantizer=haq quantizer.fold=[norm]",
    "quantizer=haq quantizer.scale_search=false quantizer.act_order=false",
    "quantizer=haq quantizer.asymmetric_calibration=false",
    "quantizer=haq quantizer.rotation=none",
    "quantizer=rtn quantizer.rotation=full",
    "quantizer=quarot quantizer.rotation=block quantizer.rotation_block=64",
    "data=[wikitext2,c4] data.wikitext2.path=a.txt data.wikitext2.windows=16 data.wikitext2.seqlen=1024",
    "data=[wikitext2,c4,c4_new,text,python_docs] data.c4.windows=null data.text.path=a.parquet",
    "data=wikitext2",
    "calibration=wikitext2 calibration.path=a.txt calibration.samples=128 calibration.seqlen=2048 calibration.seed=0",
    "calibration=c4 calibration.inputs=fp",
    "calibration=text calibration.path=a.jsonl calibration.inputs=quantized",
    "calibration=python_docs",
    "model=tiny_mixtral calibration.route=all calibration.min_tokens=200",
    "+experiment=demo measure=[perplexity] data=[text] data.text.path=a.txt",  # less than the experiment sets up
    "measure=perplexity",
    "measure=[memory,latency] measure.latency.wait=60 measure.latency.against=none measure.memory.prompt_tokens=8",
    "model=smol_moe offload=haq hardware=rtx3060_12g",
    "offload=fiddler hardware=jetson_orin_64g hardware.memory_gb=32",
    "measure=[lm_eval] measure.lm_eval.tasks=[arc_easy] measure.lm_eval.limit=8 measure.lm_eval.fewshot=0",
    "tracking=online",
    "tracking=[offline,online] tracking.online.project=mine",
    "force=true",
    *[f"quantizer={name} quantizer.activations={how}" for name in QUANTIZERS for how in ("token", "tensor", "static")],
    *[f"quantizer={name} quantizer.weight_bits={bits}" for name in QUANTIZERS for bits in (8, 4)],
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_fixed_spellings_are_valid(spelling):
    build(_composed(*spelling.split()))


def test_the_defaults_are_the_promised_ones():
    config = _composed()
    assert list(config.measure) == ["perplexity", "memory", "latency"]
    assert list(config.tracking) == ["offline", "private"]
    assert config.tracking.offline.mode == "offline"
    assert (config.backend._target_, config.force) == ("haq_lab.int8.cpu.backend.CpuBackend", False)
    calibration = _composed("calibration=wikitext2").calibration
    assert (calibration.samples, calibration.seqlen, calibration.seed) == (128, 2048, 0)


@pytest.mark.parametrize(
    ("choice", "modes"),
    [
        ("tracking=offline", ["offline"]),
        ("tracking=online", ["online"]),
        ("tracking=none", []),
        ("tracking=[]", []),
        ("tracking=[none]", []),
        ("tracking=[offline,online]", ["offline", "online"]),
    ],
)
def test_any_number_of_trackers_can_be_chosen(choice, modes):
    assert [tracker.mode for tracker in build(_composed(choice)).trackers] == modes


@pytest.mark.parametrize("group", ["quantizer", "offload"])
def test_none_has_the_settings_of_all_others(group):
    """So that a sweep over it and others may name them."""
    assert set(settings_of(group, "none")) == {name for option in options(group) for name in settings_of(group, option)}


CALLS: list[str] = []


@dataclass(frozen=True)
class Recording(RTN):
    """A user's quantizer that records its creation."""

    def __post_init__(self):
        CALLS.append("created")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+quantizer.x._target_=os.system", "+quantizer.x.command=x"],
            r"quantizer\.x\._target_: 'os\.system' is not a",
        ),
        (["+quantizer.x.y._target_=os.system"], r"quantizer\.x\.y\._target_: 'os\.system' is not a class of haq_lab"),
        (["+quantizer.x=[{_target_:os.system}]"], r"quantizer\.x\.0\._target_: 'os\.system' is not a class of haq_lab"),
        (["+quantizer.x._target_=unimported_module.Class"], r"'unimported_module\.Class' is not a class of haq_lab"),
        (["+quantizer.x._target_=haq_lab_imitation.Class"], r"'haq_lab_imitation\.Class' is not a class of haq_lab"),
        (
            ["+quantizer.x._target_=haq_lab.tracking.__main__.x"],
            r"'haq_lab\.tracking\.__main__\.x' is not a class of haq",
        ),
        (["+quantizer.x._target_='${.command}'", "+quantizer.x.command=os.system"], r"'os\.system' is not a class of"),
        (["+data.text.x._target_=os.system"], r"data\.text\.x\._target_: 'os\.system' is not a class of haq_lab"),
        (["+result_cache.x._target_=os.system"], r"result_cache\.x\._target_: 'os\.system' is not a class of haq_lab"),
    ],
)
def test_a_nested_target_of_another_package_is_refused_before_any_import(overrides, message, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"{arguments} is imported")

    config = _composed("data=[text]", *overrides)
    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(UserError, match=message):
        build(config)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("haq_lab.cli.main.main", r"model\.dense\._target_: 'haq_lab\.cli\.main\.main' is not a class of haq_lab"),
        (
            "haq_lab.cli.main.Console",
            r"model\.dense\._target_: 'haq_lab\.cli\.main\.Console' is not a class of haq_lab",
        ),
        ("haq_lab.cli.main.Nothing", r"model\.dense\._target_: 'haq_lab\.cli\.main\.Nothing' cannot be imported"),
    ],
)
def test_a_nested_target_must_be_a_class_that_this_project_defines(target, message):
    """Not a function, and not a class that a module of this project only imports."""
    with pytest.raises(UserError, match=message):
        build(_composed("model=smol_moe", f"model.dense._target_={target}"))


@pytest.mark.parametrize(
    "invalid_override", ["+result_cache.x._target_=os.system", "+quantizer.unknown=1", "+data.python_docs.unknown=1"]
)
def test_no_class_is_called_before_the_whole_config_is_validated(invalid_override):
    target = f"quantizer._target_={__name__}.Recording"  # pytest may import this file under another name
    CALLS.clear()
    build(_composed("quantizer=rtn", target))
    assert CALLS == ["created"]
    with pytest.raises(UserError):
        build(_composed("quantizer=rtn", target, invalid_override))
    assert CALLS == ["created"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Disjoint texts in each format."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(12000)]
    rows = [" ".join(words[start : start + 40]) for start in range(0, 12000, 40)]
    paths = {name: folder / name for name in ("train.txt", "test.txt", "train.jsonl", "valid.jsonl", "own.parquet")}
    paths["train.txt"].write_text("\n".join(rows[:60]))
    paths["test.txt"].write_text("\n".join(rows[60:120]))
    paths["train.jsonl"].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[120:180]))
    paths["valid.jsonl"].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[180:240]))
    pd.DataFrame({"text": rows[240:]}).to_parquet(paths["own.parquet"])
    return paths


def _metrics(folder: Path, *overrides: str) -> dict[str, float]:
    outcome = launch(*TINY, f"hydra.run.dir={folder}", *overrides)
    assert outcome.code == 0, outcome.err
    return json.loads((folder / "results.json").read_text())["metrics"]


@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_runs_with_every_scheme(quantizer, activations, tmp_path):
    model = "tiny_opt" if activations == "static" else "tiny_llama"
    chosen = [f"quantizer={quantizer}", f"quantizer.activations={activations}", f"model={model}", "model.layers=1"]
    metrics = _metrics(tmp_path, *chosen)
    fp = metrics["perplexity_fp.python_docs"]
    assert abs(metrics["perplexity.python_docs"] / fp - 1) < 0.5
    assert abs(metrics["perplexity_smoothed_fp.python_docs"] / fp - 1) < 1e-4
    assert metrics["quantizer.dynamic_share"] == (activations != "static")


@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_runs_on_a_mixture_of_experts(quantizer, activations, tmp_path):
    chosen = [f"quantizer={quantizer}", f"quantizer.activations={activations}", "model=tiny_mixtral", "model.layers=1"]
    metrics = _metrics(tmp_path, *chosen)
    fp = metrics["perplexity_fp.python_docs"]
    assert abs(metrics["perplexity.python_docs"] / fp - 1) < 0.5
    assert abs(metrics["perplexity_smoothed_fp.python_docs"] / fp - 1) < 1e-4
    layers = pd.read_csv(tmp_path / "layers.csv")
    assert layers["linear"].str.contains("experts").sum() == 24
    calibrated = (quantizer, activations) != ("rtn", "token")
    assert (tmp_path / "experts.csv").is_file() == (tmp_path / "routing.safetensors").is_file() == calibrated
    if calibrated:
        experts = pd.read_csv(tmp_path / "experts.csv")
        assert experts["tokens"].sum() == 4 * 64 * 2
        assert (layers["fallback"] == "shared").sum() == metrics["quantizer.fallback_modules"] > 0


def test_the_experts_tokens_are_a_choice(tmp_path):
    errors = {}
    for route in ("topk", "all"):
        few = ["model=tiny_mixtral", "quantizer=gptq", f"calibration.route={route}", "calibration.min_tokens=1"]
        _metrics(tmp_path / route, *few)
        layers = pd.read_csv(tmp_path / route / "layers.csv")
        errors[route] = layers[layers["linear"].str.contains("gate_proj")]["output_error"].tolist()
    assert errors["topk"] != errors["all"]


def test_haq_chooses_schemes_by_itself(tmp_path):
    metrics = _metrics(tmp_path, "quantizer=haq", "quantizer.activations=auto")
    assert 0 <= metrics["quantizer.dynamic_share"] <= 1


@pytest.mark.parametrize("part", ["adaptive", "scale_search", "act_order", "asymmetric_calibration", "fold"])
def test_every_part_of_haq_can_be_switched_off(part, tmp_path):
    _metrics(tmp_path, "model.layers=1", "quantizer=haq", f"quantizer.{part}={'[]' if part == 'fold' else 'false'}")


@pytest.mark.parametrize("backend", ["fake", "reference", "cpu"])
def test_backends_agree(backend, tmp_path):
    metrics = _metrics(tmp_path, f"backend={backend}", "quantizer.weight_bits=4")
    reference = _metrics(tmp_path / "reference", "quantizer.weight_bits=4")
    assert metrics["perplexity.python_docs"] == pytest.approx(reference["perplexity.python_docs"], rel=1e-3)


def test_full_precision_has_one_perplexity(tmp_path):
    metrics = _metrics(tmp_path, "quantizer=none", "measure=[perplexity,memory]")
    assert metrics["perplexity.python_docs"] == metrics["perplexity_fp.python_docs"]
    assert metrics["memory.weights_bytes"] == pytest.approx(2 * metrics["memory.weights_fp16_bytes"], rel=0.01)


@pytest.mark.parametrize("inputs", ["fp", "quantized"])
def test_gptq_calibrates_on_either_model(inputs, tmp_path):
    _metrics(tmp_path, "quantizer=gptq", f"calibration.inputs={inputs}")


def test_many_texts_in_every_format(texts, tmp_path):
    names = {"wikitext2": "test.txt", "c4": "valid.jsonl", "c4_new": "valid.jsonl", "text": "own.parquet"}
    settings = [
        setting
        for name, file in names.items()
        for setting in (f"data.{name}.path={texts[file]}", f"data.{name}.seqlen=64", f"data.{name}.windows=2")
    ]
    plain = [setting for setting in TINY if not setting.startswith("data")]
    outcome = launch(*plain, f"data=[{','.join(names)}]", *settings, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "results.json").read_text())
    for name in names:
        assert results["metrics"][f"perplexity.{name}"] > 1
        assert results["protocol"][name]["windows"] == 2


@pytest.mark.parametrize(
    ("calibration", "file"), [("wikitext2", "train.txt"), ("c4", "train.jsonl"), ("text", "own.parquet")]
)
def test_every_calibration_text(calibration, file, texts, tmp_path):
    settings = [f"calibration={calibration}", f"calibration.path={texts[file]}"]
    _metrics(tmp_path, "quantizer=smoothquant", *settings)
    assert json.loads((tmp_path / "results.json").read_text())["protocol"]["calibration"]["text"] == calibration


def test_text_that_calibrates_may_not_evaluate(texts, tmp_path):
    plain = [setting for setting in TINY if not setting.startswith("data")]
    same = [f"calibration.path={texts['own.parquet']}", f"data.text.path={texts['own.parquet']}", "data.text.seqlen=64"]
    outcome = launch(*plain, "data=[text]", "calibration=text", "quantizer=gptq", *same, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert "data.text" in outcome.err
    assert "choose another text" in outcome.err


@pytest.mark.parametrize("measures", ["memory", "latency", "perplexity"])
def test_any_measure_can_stand_alone(measures, tmp_path):
    quick = ["measure.latency.seconds=0", "measure.latency.iterations=1"] if measures == "latency" else []
    metrics = _metrics(tmp_path, f"measure=[{measures}]", *quick)
    assert any(name.startswith(measures) for name in metrics)


def _small(experiment: str, texts: dict[str, Path]) -> list[str]:
    """Overrides that let an experiment run here: a tiny model, which has experts where they are offloaded."""
    config = _composed(f"+experiment={experiment}")
    kept = ("data", "measure", "quantizer", "model")
    small = [setting for setting in TINY if not setting.startswith(kept)]
    offloads = config.offload._target_ is not None
    small += ["model=tiny_mixtral", "model.layers=1"] if offloads else ["model=tiny_llama"]
    small += ["offload.budget=75%"] if offloads else []
    small += [f"data.{name}.{setting}" for name in config.data for setting in ("seqlen=64", "windows=1")]
    small += [f"data.{name}.path={texts['test.txt']}" for name in config.data if name != "python_docs"]
    small += [f"calibration.path={texts['train.txt']}"] if config.calibration.text != "python_docs" else []
    quick = ("seconds=0", "iterations=1", "prompt_tokens=8", "decode_tokens=2")
    return small + [f"measure.latency.{setting}" for setting in quick if "latency" in config.measure]


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_runs_on_a_tiny_model(experiment, texts, tmp_path):
    outcome = launch(f"experiment={experiment}", *_small(experiment, texts), f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "results.json").is_file()


SWEEPS = {
    "paper_opt": (25, ["quantizer=none,rtn"]),
    "paper_mixtral": (5, ["quantizer=none,haq"]),
    "paper_memory": (8, ["quantizer=rtn,gptq"]),
    "paper_latency": (7, ["offload=lru,layer_split"]),
    "paper_hit_rate": (12, ["offload=static,haq"]),
    "ablation_haq": (8, ["quantizer.adaptive=false", "quantizer.act_order=true"]),
    "pareto": (27, ["quantizer=rtn", "offload=lru,haq"]),
}


def test_every_sweep_that_an_experiment_holds_is_listed_and_composes():
    composed = {name: _sweep(name) for name in options("experiment")}
    assert {name: len(jobs) for name, jobs in composed.items() if jobs} == {name: SWEEPS[name][0] for name in SWEEPS}
    for name, jobs in composed.items():
        for job in jobs[:: max(len(jobs) - 1, 1)]:  # the first and the last, which differ in every choice
            build(_composed(f"+experiment={name}", *job))


def _sweep(experiment: str) -> list[list[str]]:
    """The overrides of each job of an experiment's sweep."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(bundled("conf").resolve()), version_base="1.3"):
        config = compose("config", [f"+experiment={experiment}"], return_hydra_config=True)
    params = config.hydra.sweeper.params or {}
    parsed = OverridesParser.create().parse_overrides([f"{name}={values}" for name, values in params.items()])
    return BasicSweeper.split_arguments(parsed, None)[0] if params else []


@pytest.mark.every(3)
@pytest.mark.parametrize("experiment", SWEEPS)
def test_a_sweep_is_one_command_and_its_table_has_the_published_column(experiment, texts, tmp_path):
    fewer = [*_small(experiment, texts), *SWEEPS[experiment][1]]
    outcome = launch("-m", f"experiment={experiment}", *fewer, f"hydra.sweep.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    runs = load(tmp_path)
    assert (runs["status"] == "finished").all()
    assert len(runs) == 2
    assert set(runs["experiment"]) == {experiment}
    assert beside(runs).empty == (not experiment.startswith("paper"))
    decoded = experiment in ("paper_latency", "paper_hit_rate", "pareto")
    assert ("offload.hit_rate_pairs" in runs) == decoded  # a rate of nothing is none
