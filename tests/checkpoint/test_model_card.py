"""A checkpoint has a model card that the hub can read. It shows what the run measured."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from haq_lab.checkpoint.inspect import find_problems
from haq_lab.checkpoint.manifest import Manifest
from haq_lab.checkpoint.model_card import CARD, write_model_card


def test_a_run_writes_the_card(written):
    card = ModelCard.load(written / "checkpoint" / CARD)
    assert card.data.library_name == "transformers"
    assert {"haq_lab", "w8a8", "haq"} <= {*card.data.tags}
    assert card.data.base_model is None  # the model was made here
    results = json.loads((written / "run" / "results.json").read_text())
    full, quantised = (results["metrics"][f"{name}.python_docs"] for name in ("perplexity_fp", "perplexity"))
    error = 100 * quantised / full * results["metrics"]["dlnppl.python_docs.stderr"]
    change = f"{100 * (quantised / full - 1):+.2f} ± {error:.2f} %"
    assert f"| python_docs | 2 windows of 64 tokens | {full:.3f} | {quantised:.3f} | {change} |" in card.text
    assert "| calibration | python_docs: 4 windows of 64 tokens, seed 0 |" in card.text
    assert "one scale per tensor, from calibration, after a Hadamard rotation in blocks of " in card.text
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card.text


def test_the_card_may_be_changed(checkpoint):
    assert CARD not in Manifest.read(checkpoint).files
    (checkpoint / CARD).write_text("my text")
    assert list(find_problems(checkpoint)) == []
    (checkpoint / CARD).unlink()
    assert list(find_problems(checkpoint)) == []


@pytest.mark.parametrize("revision", [None, "a" * 40])
def test_a_model_from_the_hub_is_the_base_model(checkpoint, revision):
    config = json.loads((checkpoint / "config.json").read_text())
    made = config["quantization_config"]["provenance"]
    made["model"] = {"label": "SmolLM2-135M", "revision": revision, "files": {}}
    made["settings"]["model"] = {"_target_": "HubModel", "name": "HuggingFaceTB/SmolLM2-135M"}
    made["calibration"] = None
    (checkpoint / "config.json").write_text(json.dumps(config))
    write_model_card(checkpoint, {"perplexity.text": 3.0, "perplexity_fp.text": None}, {"text": {}})
    card = ModelCard.load(checkpoint / CARD)
    assert card.data.base_model == (revision and "HuggingFaceTB/SmolLM2-135M")
    assert "## Perplexity" not in card.text
    assert "| calibration |" not in card.text
