"""The tiny Mixtral learns, balances its experts and is reproducible."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from haq_lab.data.text import python_docs
from haq_lab.zoo.sanity_check import check_model
from haq_lab.zoo.trained_tiny import TrainedTinyModel, bpe_tokenizer

SMALL = {"layers": 2, "hidden": 32, "experts": 4, "vocabulary": 300, "batch": 4, "seqlen": 32}


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("haq_lab.zoo.sanity_check.SEQLEN", 128)
        yield


@pytest.fixture(scope="module")
def folder():
    return TrainedTinyModel(**SMALL, steps=60).folder()


def test_it_learns(folder):
    untrained = check_model(TrainedTinyModel(**SMALL, steps=0).folder(), torch.float32)
    trained = check_model(folder, torch.float32)
    assert untrained.perplexity == pytest.approx(300, rel=0.2), "before, every token is about as likely"
    assert trained.perplexity < 0.5 * untrained.perplexity


def test_its_experts_differ_and_all_are_used(folder):
    experts = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.experts.down_proj
    assert all(not torch.allclose(experts[0], other, atol=1e-3) for other in experts[1:])
    facts = check_model(folder, torch.float32)
    assert min(map(min, facts.shares)) > 0.01
    assert all(math.isclose(sum(layer), 1, abs_tol=1e-5) for layer in facts.shares)
    assert all(0 < repeat < 1 for repeat in facts.repeats)
    assert len(facts.lines("name")) == 3


def test_the_same_seed_gives_the_same_weights(folder, tmp_path):
    from haq_lab.zoo.trained_tiny import train

    train(TrainedTinyModel(**SMALL, steps=60), tmp_path)
    first, again = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_its_tokenizer_reads_any_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("def f(x): return x", "na\u00efve \u2603 \U0001f600\n\ttabs"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(bpe_tokenizer(python_docs("calibration"), 500)) == 500
