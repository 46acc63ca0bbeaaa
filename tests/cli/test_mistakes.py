"""Each mistake of a user gives exit code 2 and one line, which names the setting, its value and the remedy."""

from __future__ import annotations

import json
import pwd
import re
import shlex

import pytest
import torch
from launching import TINY, launch
from safetensors.torch import load_file, save_file

from haq_lab.models.sources import TinyModel


@pytest.fixture
def tiny_run(tmp_path):
    """`tiny_run("quantizer=gptq", ...)` -> exit code, standard output, standard error."""
    return lambda *more: launch(*TINY, f"hydra.run.dir={tmp_path / 'run'}", *more)


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
            "quantizer.dampening_frac: only quantizer=gptq, haq, quarot has this setting. Choose only from these opt",
        ),
        ("quantizer.damp=0.1", r"quantizer\.damp: there is no such setting any more\. Use quantizer\.dampening_frac"),
        ("++quantizer.asymmetric=true", r"any more\. Use quantizer\.asymmetric_calibration"),
        ("+objective=kl.c4", r"objective: there is no such setting any more\. Use search_metric"),
        ("tracking.mode=online", r"tracking\.mode: there is no such setting any more\. Use tracking\.offline\.mode"),
        ("+tracking.project=x", r"tracking\.project: there is no such setting any more\. Use tracking\.offline\.pro"),
        ("tracking._target_=my.Tracker", r"any more\. Use tracking\.NAME\._target_"),
        ("+tracking._target_=my.Tracker", r"any more\. Use tracking\.NAME\._target_"),
        ("+tracking.x={_target_:haq_lab.tracking.wandb.Wandb,mode:on}", "tracking.x.mode: 'on' is not one of off"),
        (
            "+tracking.mine._target_=builtins.object",
            "tracking.mine._target_: 'builtins.object' is not of the type T",
        ),
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
        (
            "quantizer._target_=haq_lab.quantizers.rtn.Rtn",
            "'haq_lab.quantizers.rtn.Rtn' cannot be imported: 'haq_lab.quantizers.rtn' has no 'Rtn' .*mean 'RTN'",
        ),
        ("quantizer=mine.Mine", "quantizer: 'mine.Mine' is not an option. Write quantizer=rtn quantizer._target_=mine"),
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
def test_a_mistake_gives_one_line(mistake, message, tiny_run):
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


@pytest.mark.parametrize(
    ("override", "spelling"),
    [
        ("model=facebook/opt-125m", "model=hf model.name=facebook/opt-125m"),
        ("model=/models/my.model", "model=hf model.name=/models/my.model"),
        ("model=folder", "model=hf model.name=folder"),
        ("model=checkpoint", "model=quantized model.path=checkpoint"),
        ("model=model.gguf", "model=gguf model.path=model.gguf"),
        ("data=my.jsonl", "data=text data.text.path=my.jsonl"),
        ("data=folder/text", "data=text data.text.path=folder/text"),
        ("data=folder", "data=text data.text.path=folder"),
        ("calibration=my.txt.gz", "calibration=text calibration.path=my.txt.gz"),
    ],
)
def test_a_path_as_an_option_gives_the_right_spelling(override, spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "manifest.json").write_text("{}")
    group, _, value = override.partition("=")
    outcome = launch(override)
    assert outcome.code == 2
    assert outcome.err == f"haq_lab: {group}: '{value}' is not an option of {group}. Write {spelling}.\n"


@pytest.mark.parametrize(
    ("override", "hint"), [("backend=gpu", "did you mean 'cuda'?"), ("tracking=wandb", "did you mean 'offline'?")]
)
def test_a_name_that_other_tools_use_gives_ours(override, hint):
    outcome = launch(override)
    assert outcome.code == 2
    assert hint in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("setting", ["hydra.run.dir", "hydra.sweep.dir", "checkpoint.dir"])
@pytest.mark.parametrize("value", ["a/lr=1/run", "a b=c", "runs/(1)", "it's=1"])
def test_a_value_that_hydra_cannot_parse_is_named_with_its_quoted_form(setting, value):
    """The quoted form is one argument for a shell, and Hydra parses it to the value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    outcome = launch(*TINY, f"{setting}={value}")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(f"haq_lab: {setting}: '{value}' cannot be parsed (")
    (argument,) = shlex.split(outcome.err.strip().rpartition(" Quote the value: ")[2].removesuffix("."))
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert (override.key_or_group, override.value()) == (setting, value)


# --- a user without a home folder, as in a container with `docker run --user`


@pytest.fixture
def homeless(monkeypatch):
    """No `HOME`, and a user id that the system does not know."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "HAQ_LAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_the_message_names_the_variable(homeless, tiny_run):
    code, _, err = tiny_run()
    assert code == 2
    assert err.startswith("haq_lab: HOME: the home folder of this user cannot be found.")
    assert "HAQ_LAB_CACHE" in err
    assert len(err.splitlines()) == 1


def test_without_a_home_a_run_needs_only_the_cache_folder(homeless, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path / "cache"))
    assert tiny_run("tracking=offline")[0] == 0
    assert "failed" not in (tmp_path / "run" / "events.jsonl").read_text()


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])  # neither can be written to, not even by root
def test_a_home_that_cannot_be_written_to(home, tiny_run, monkeypatch):
    for name in ("HAQ_LAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    code, _, err = tiny_run()
    assert code == 2
    assert err.endswith("Set HAQ_LAB_CACHE to a folder that you can write to.\n")
    assert len(err.splitlines()) == 1
