"""Latency: every token timed on its own, within the model's positions."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from haq_lab.calibration.dataset import Calibration
from haq_lab.data.windows import PythonDocs, Windows
from haq_lab.measure.base import Study
from haq_lab.measure.latency import Latency, _generate
from haq_lab.models.layerwise import LayeredModel
from haq_lab.utils.errors import UserError
from tests.measure.conftest import TEXTS, study_of
from tests.models.test_layerwise import VARIANTS, save

QUICK = {"prompt_tokens": 8, "decode_tokens": 3, "iterations": 2, "seconds": 0, "warmup": 1}


def measured(study: Study, **settings) -> dict[str, float]:
    """Measure the latency of a study with prompts from its text."""
    measure = Latency(**settings)
    study.prompts = {measure: measure.load_prompts(study.model, TEXTS)}
    return measure(study)


class Watched(nn.Module):
    """Notes the length of every forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.lengths, self.kept = model, [], []

    def forward(self, tokens: Tensor, cache, **options):
        self.kept.append(0 if cache is None else cache.get_seq_length())
        self.lengths.append(tokens.shape[1])
        return self.model(tokens, cache=cache, **options)


def test_all_metrics_are_there(quantized):
    metrics = measured(quantized, **QUICK)
    assert set(metrics) == {
        "latency.prefill_ms",
        "latency.tokens_per_s",
        *(f"latency.decode_ms_per_token.{name}" for name in ("mean", "p50", "p95", "std")),
    }
    assert all(value > 0 for value in metrics.values())
    assert metrics["latency.decode_ms_per_token.p50"] <= metrics["latency.decode_ms_per_token.p95"]
    assert metrics["latency.tokens_per_s"] == pytest.approx(1e3 / metrics["latency.decode_ms_per_token.mean"])


def test_prompts_are_whole_and_tokens_come_one_by_one(full):
    watched = Watched(full.whole)
    measured(dataclasses.replace(full, whole=watched), **QUICK)
    assert watched.lengths == [8, 1, 1, 1] * 3, "a warm-up and two iterations"
    assert watched.kept == [0, 8, 9, 10] * 3


@pytest.mark.parametrize("variant", ["opt_post_norm", "llama_biases"])
@pytest.mark.parametrize(("prompt", "decode"), [(1000, 3), (128, 1), (8, 1000)])
def test_more_tokens_than_positions_are_refused(variant, prompt, decode, tmp_path):
    model = LayeredModel(save(VARIANTS[variant], tmp_path))
    with pytest.raises(UserError, match=rf"^measure.latency.prompt_tokens: {prompt} and {decode} .* model's 128 "):
        Latency(prompt_tokens=prompt, decode_tokens=decode).load_prompts(model, TEXTS)


@pytest.mark.parametrize("variant", ["opt_post_norm", "llama_biases"])
@pytest.mark.parametrize(("prompt", "decode"), [(127, 1), (1, 127), (100, 28)])
def test_all_positions_can_be_used(variant, prompt, decode, windows, tmp_path):
    study = study_of(LayeredModel(save(VARIANTS[variant], tmp_path)), None, windows)
    study.whole = Watched(study.whole)
    settings = {"iterations": 1, "seconds": 0, "warmup": 0, "prompt": "random"}  # the model has no tokenizer
    measured(study, prompt_tokens=prompt, decode_tokens=decode, **settings)
    assert study.whole.lengths == [prompt] + [1] * decode


def test_prompts_are_the_first_tokens_of_the_text(full):
    prompts = Latency(**QUICK).load_prompts(full.model, TEXTS)
    text = PythonDocs(seqlen=8, windows=None).load(full.model.tokenizer())
    assert torch.equal(prompts.tokens, text.tokens[:3])
    assert prompts.protocol["text"] == "python_docs"
    assert prompts.protocol["tokens"] == 8
    assert prompts.protocol["prompts"] == 2
    assert prompts.protocol["decode_tokens"] == 3
    assert prompts.protocol["text_sha256"] == text.protocol["text_sha256"]


def test_without_data_prompts_come_from_the_calibration_text(full):
    texts = dataclasses.replace(TEXTS, data={})
    prompts = Latency(**QUICK).load_prompts(full.model, texts)
    calibration = Calibration("python_docs", seqlen=8, samples=3).load(full.model.tokenizer())
    assert torch.equal(prompts.tokens, calibration.tokens)
    assert prompts.protocol["text"] == "python_docs (calibration)"
    assert prompts.protocol["seed"] == calibration.protocol["seed"]


def test_random_prompts_depend_on_the_seed_alone(full):
    def draw(seed: int) -> Windows:
        return Latency(**QUICK, prompt="random", seed=seed).load_prompts(full.model, TEXTS)

    assert torch.equal(draw(1).tokens, draw(1).tokens)
    assert not torch.equal(draw(1).tokens, draw(2).tokens)
    stamp = {"text": "random", "tokens": 8, "seed": 1, "prompts": 2, "decode_tokens": 3}
    assert draw(1).protocol == stamp


def test_the_model_runs_the_prompts_and_offloading_counts_all_but_the_warm_up(full, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("haq_lab.measure.latency.time.perf_counter", lambda: next(ticks))
    seen, counted = [], []

    class Recording(Watched):
        def forward(self, tokens: Tensor, cache, **options):
            if cache is None:
                seen.append(tokens[0])
                counted.append(counting)
            return super().forward(tokens, cache, **options)

    counting = False

    @contextmanager
    def count() -> Iterator[None]:
        nonlocal counting
        counting = True
        yield
        counting = False

    study = dataclasses.replace(full, whole=Recording(full.whole), counting=count)
    measured(study, **{**QUICK, "seconds": 50})
    prompts = Latency(**QUICK).load_prompts(full.model, TEXTS).tokens
    assert torch.equal(torch.stack(seen[:3]), prompts[[2, 0, 1]]), "the warm-up has its own prompt"
    assert len(seen) > 5
    assert torch.equal(torch.stack(seen[3:]), prompts[:2].repeat(len(seen), 1)[: len(seen) - 3])
    assert counted == [False, True, True] + [False] * (len(seen) - 3), "repetitions are timed and not counted"


def test_runs_for_at_least_the_seconds_asked(full):
    started = time.perf_counter()
    measured(full, **{**QUICK, "seconds": 0.3, "iterations": 1, "warmup": 0})
    assert time.perf_counter() - started >= 0.3


class OneSecondAToken(nn.Module):
    """A model that advances a clock by one second for each token of its input, and more with each decoded token."""

    def __init__(self, clock: list[float]):
        super().__init__()
        self.clock, self.steps = clock, 0
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor, cache, **options):
        self.steps = 0 if cache is None else self.steps + 1
        self.clock[0] += tokens.shape[1] + self.steps
        return SimpleNamespace(logits=torch.zeros(1, tokens.shape[1], 5), cache=object())


def test_the_figures_are_those_of_a_known_clock(full, monkeypatch):
    """The prefill is the prompt's forward alone, percentiles are numpy's, and the table is in milliseconds."""
    clock = [0.0]
    monkeypatch.setattr("haq_lab.measure.latency.time.perf_counter", lambda: clock[0])
    study = dataclasses.replace(full, whole=OneSecondAToken(clock), tables={})
    metrics = measured(study, prompt_tokens=7, decode_tokens=20, iterations=1, seconds=0, warmup=0)
    decoded = 1e3 * np.arange(2, 22)  # the n-th decoded token takes 1 + n seconds
    assert metrics["latency.prefill_ms"] == 7e3
    assert metrics["latency.decode_ms_per_token.mean"] == pytest.approx(decoded.mean())
    assert metrics["latency.decode_ms_per_token.p50"] == pytest.approx(np.percentile(decoded, 50))
    assert metrics["latency.decode_ms_per_token.p95"] == pytest.approx(np.percentile(decoded, 95))
    assert metrics["latency.decode_ms_per_token.std"] == pytest.approx(decoded.std())
    table = study.tables["latency"]
    assert list(table.loc[table["phase"] == "prefill", "ms"]) == [7e3]
    assert list(table.loc[table["phase"] == "decode", "ms"]) == pytest.approx(list(decoded))


def test_each_sample_waits_for_the_models_gpu(monkeypatch):
    """With `backend.device=cuda:1 backend.share=true`, torch's current device is still GPU 0."""
    second, waited = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    output = MagicMock()
    output.logits.__getitem__.return_value.argmax.return_value = SimpleNamespace(is_cuda=True, device=second)
    assert len(_generate(lambda *tokens, **options: output, torch.zeros(1, 3), 2)) == 3
    assert waited == [second] * 3
