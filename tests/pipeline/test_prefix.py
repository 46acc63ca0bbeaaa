"""Runs with `quantizer.prefix`: metrics, stamps, resume, the result cache, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import TINY, launch
from transformers import AutoModelForCausalLM

import haq_lab.hf  # noqa: F401  # registers the checkpoints' format
from haq_lab.calibration.prefix_states import compute_prefix
from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.checkpoint.accept import accept
from haq_lab.checkpoint.export.engines import export
from haq_lab.checkpoint.manifest import Manifest
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.data.windows import Windows
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.pipeline.deployment import load_checkpoint
from haq_lab.pipeline.prefix import stamp_prefix
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.prefix.attention import attached
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.utils.errors import UserError

NEWLINE = 'quantizer.prefix="\\n"'  # as a shell passes it
BYTE = 199  # the token of a newline


def _run(folder: Path, *settings: str) -> dict:
    outcome = launch(*TINY, *settings, f"hydra.run.dir={folder}")
    assert outcome.code == 0, outcome.err
    return json.loads((folder / "results.json").read_text()) | {"out": outcome.out}


def _events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A run with a prefix, in `run`, and its checkpoint."""
    folder = tmp_path_factory.mktemp("prefix")
    static = ["model=tiny_mixtral", "quantizer=haq", "quantizer.activations=static", NEWLINE]  # HAQ scales values
    _run(folder / "run", *static, "measure=[perplexity,latency]", "measure.latency.seconds=0",
         "measure.latency.prompt_tokens=8", f"checkpoint.dir={folder / 'checkpoint'}")  # fmt: skip
    return folder


def test_smoothing_preserves_the_function_behind_a_prefix(tiny, windows):
    model = tiny.with_prefix(compute_prefix(tiny, (5, 6, 7), ""))
    layers = []
    inputs = PassInputs(
        model, HAQ(sensitivity=0), ReferenceBackend(), windows.flip(0), CalibrationPolicy(), {"text": windows}
    )
    hidden = sequential_pass(inputs, lambda index, layer: layers.append(layer)).hidden["text"]
    logits = {level: model.head(states) for level, states in hidden.items()}
    assert float((logits["smoothed"] - logits["fp"]).norm() / logits["fp"].norm()) < 1e-4
    states = model.prefix.states.values
    changed = [not torch.allclose(attached(layer)[1], own) for layer, own in zip(layers, states, strict=True)]
    assert all(changed), "factors are folded into the value projection, and so into the prefix's values"
    again = model.load_layer(0)
    assert torch.equal(attached(again)[1], states[0]), "but not into the full-precision model's"


def test_full_precision_is_reported_with_and_without(written, tmp_path):
    with_prefix = json.loads((written / "run" / "results.json").read_text())["metrics"]
    without = _run(tmp_path / "plain", "model=tiny_mixtral")["metrics"]
    assert with_prefix["perplexity_fp_no_prefix.python_docs"] == pytest.approx(without["perplexity_fp.python_docs"])
    assert with_prefix["perplexity_fp.python_docs"] != pytest.approx(without["perplexity_fp.python_docs"], rel=1e-3)
    assert "perplexity_fp_no_prefix.python_docs" not in without
    assert with_prefix["kl.python_docs"] > 0


def test_stamps_name_the_prefix(written):
    record = json.loads((written / "run" / "results.json").read_text())
    for text in ("python_docs", "calibration", "latency"):
        assert record["protocol"][text]["prefix"] == {"tokens": [BYTE], "text": "\n"}, text
    assert record["protocol"]["python_docs"]["comparable_with"] == []
    assert record["protocol"]["python_docs"]["tokens_scored"] == 2 * 63
    assert record["run"]["prefix"] == 'prefix: "\\n"'
    (event,) = [event for event in _events(written / "run") if event["event"] == "prefix"]
    assert event["text"] == "\n"


@pytest.mark.parametrize("architecture", ["llama"])
def test_nothing_published_is_comparable_behind_a_prefix(tiny):
    stamps = [{"comparable_with": ["wikitext2 perplexity of GPTQ"]} for _ in range(2)]
    for model, stamp in zip((tiny, tiny.with_prefix(compute_prefix(tiny, (5,), "x"))), stamps, strict=True):
        stamp_prefix(model, [Windows(torch.zeros(1, 1), stamp)])
    assert stamps == [
        {"comparable_with": ["wikitext2 perplexity of GPTQ"]},
        {"comparable_with": [], "prefix": {"tokens": [5], "text": "x"}},
    ]


def test_a_checkpoint_has_the_prefix(written, windows):
    folder = written / "checkpoint"
    model = QuantizedModel(folder, ReferenceBackend())
    assert model.prefix is not None
    assert model.prefix.stamp() == json.loads((folder / "config.json").read_text())["quantization_config"]["prefix"]
    ours, _ = load_checkpoint(folder, ReferenceBackend())
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.max_position_embeddings == 2047
    logits = theirs(windows).logits
    assert (logits - ours(windows).logits).norm() / logits.norm() < 0.02  # native, and not
    prompt = windows[:1, :10]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False}
    assert theirs.generate(prompt, **arguments).shape == (1, 14)


def test_a_checkpoint_scores_as_the_run_that_wrote_it(written, tmp_path):
    own = [setting for setting in TINY if not setting.startswith(("model=", "quantizer="))]
    outcome = launch(*own, "model=quantized", f"model.path={written / 'checkpoint'}", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert 'prefix: "\\n", of the checkpoint' in outcome.out
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (written / "run", tmp_path))
    name = "perplexity.python_docs"
    assert after["metrics"][name] == pytest.approx(before["metrics"][name], rel=1e-6)
    assert after["protocol"]["python_docs"]["prefix"] == {"tokens": [BYTE], "text": "\n"}


def test_prefix_tensors_must_fit_the_named_tokens(written, tmp_path):
    copy = Path(shutil.copytree(written / "checkpoint", tmp_path / "copy"))
    settings = json.loads((copy / "config.json").read_text())
    for stamp, message in (
        ({"tokens": [1, 2], "text": "ab"}, "self_attn.prefix_keys' does not fit the config"),
        (None, "self_attn.prefix_keys' is superfluous"),
        ({"tokens": "ab"}, r"the prefix in .*config\.json is not readable"),
    ):
        settings["quantization_config"]["prefix"] = stamp
        (copy / "config.json").write_text(json.dumps(settings))
        accept(copy)
        with pytest.raises(UserError, match=message):
            QuantizedModel(copy, ReferenceBackend()).load_layer(0)


@pytest.mark.parametrize("engine", ["transformers", "vllm", "gguf"])
def test_other_engines_have_no_prefix(written, tmp_path, engine):
    with pytest.raises(UserError, match=re.escape("has the prefix '\\n', which other engines do not support")):
        export(written / "checkpoint", tmp_path / "out.gguf", engine)


@pytest.mark.parametrize("layers_done", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, layers_done, monkeypatch):
    settings = ["model=tiny_opt", "model.layers=3", "quantizer.activations=static", "quantizer.prefix=[5,6]"]
    _run(tmp_path / "whole", *settings, f"checkpoint.dir={tmp_path / 'a'}")
    keep = CheckpointWriter.keep

    def stop(self, index, layer, state):
        keep(self, index, layer, state)
        if index + 1 == layers_done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "keep", stop)
        assert launch(*TINY, *settings, f"checkpoint.dir={tmp_path / 'b'}", f"hydra.run.dir={tmp_path / 'r'}").code
    resumed = _run(tmp_path / "r", *settings, f"checkpoint.dir={tmp_path / 'b'}")
    assert resumed["run"]["resumed_from_layer"] == layers_done
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())["metrics"]
    names = [name for name in whole if name.startswith(("perplexity", "kl"))]
    assert len(names) == 10
    assert {name: resumed["metrics"][name] for name in names} == {name: whole[name] for name in names}
    assert Manifest.read(tmp_path / "a") == Manifest.read(tmp_path / "b")


def test_the_result_cache_shares_what_a_prefix_does_not_change(tmp_path):
    settings = ["model=tiny_llama", "quantizer.activations=static", "result_cache.enabled=true"]
    settings += ["calibration.inputs=fp", f"result_cache.dir={tmp_path / 'store'}"]
    plain = _run(tmp_path / "plain", *settings)
    first = _run(tmp_path / "text", *settings, NEWLINE)
    assert first["run"]["reused"] == ["1 x baseline"], "only full precision without the prefix is the same"
    named = _run(tmp_path / "ids", *settings, f"quantizer.prefix=[{BYTE}]")
    assert "1 x pass" in named["run"]["reused"], "the same tokens by another name"
    fresh = _run(tmp_path / "fresh", *settings[:2], NEWLINE, "calibration.inputs=fp")
    for record in (named, fresh):
        kept = {name: value for name, value in record["metrics"].items() if name.startswith(("perplexity", "kl"))}
        assert kept == {name: first["metrics"][name] for name in kept}
    assert plain["metrics"]["perplexity.python_docs"] != first["metrics"]["perplexity.python_docs"]


@pytest.mark.parametrize("activations", ["token", "static"])
def test_auto_says_what_it_chose(tmp_path, activations):
    record = _run(tmp_path, "quantizer.prefix=auto", f"quantizer.activations={activations}")
    (event,) = [event for event in _events(tmp_path) if event["event"] == "prefix"]
    tried = [tuple(candidate["tokens"]) for candidate in event["candidates"]]
    assert tried[:3] == [(), (BYTE,), (0,)], "none, a newline, the end token"
    errors = {tuple(candidate["tokens"]): candidate["error"] for candidate in event["candidates"]}
    helps = min(errors.values()) <= 0.9 * errors[()]
    assert bool(event["tokens"]) == helps
    assert "chosen by quantizer.prefix=auto (predicted error" in record["out"]
    assert ("prefix" in record["protocol"]["python_docs"]) == helps


def test_auto_leaves_a_full_context_alone(tmp_path):
    record = _run(tmp_path, "quantizer.prefix=auto", "data.python_docs.seqlen=2048", "data.python_docs.windows=1")
    assert "the windows leave no position for it" in record["out"]
    assert "prefix" not in record["protocol"]["python_docs"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("''", "quantizer.prefix: '' is not valid. Write none, auto, a text that is not empty, or a list"),
        ("[]", "quantizer.prefix: '[]' is not valid. Write none"),
        ("198", "quantizer.prefix: '198' is not valid. Write none"),
        ("[5,257]", "prefix: there is no token 257, because the model has the tokens 0 to 256 (nearest: 256)"),
        ("[-1]", "there is no token -1, because the model has the tokens 0 to 256 (nearest: 0)"),
        ("[5,6,7]", "quantizer.prefix: 3 and the 2046 tokens of data.python_docs.seqlen are more than the model's 2048 "
                    "positions. Choose data.python_docs.seqlen=2045 or less, or quantizer.prefix=none."),
        (f"[{','.join(['5'] * 2048)}]", "quantizer.prefix: 2048 tokens are too many for the model's 2048 positions"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["tiny_opt", "tiny_llama"])
def test_refusals(tmp_path, value, message, model):
    settings = [f"model={model}", f"quantizer.prefix={value}", "data.python_docs.seqlen=2046"]
    outcome = launch(*TINY, *settings, "data.python_docs.windows=1", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_prefix_without_a_quantizer_has_no_effect(tmp_path):
    outcome = launch(*TINY, "quantizer=none", "quantizer.prefix=auto", f"hydra.run.dir={tmp_path}")
    assert (outcome.code, "quantizer.prefix has no effect because quantizer=none" in outcome.err) == (2, True)
