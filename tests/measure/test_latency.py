"""Latency: every token timed on its own, within the model's positions."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from haq_lab.calibration.dataset import Calibration
from haq_lab.config.build import build
from haq_lab.config.compose import compose_run
from haq_lab.data.windows import PythonDocs, Windows
from haq_lab.measure.base import Study
from haq_lab.measure.latency import Latency, _speed_over_reference
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
    metrics = {name: value for name, value in metrics.items() if not name.startswith("latency.machine.")}
    assert metrics.pop("latency.spread") >= 0
    assert set(metrics) == {
        "latency.prefill_ms",
        "latency.tokens_per_s",
        "latency.threads",
        "latency.wall_over_cpu",
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


def clocks(monkeypatch, wall: list[float], cpu: list[float]) -> None:
    """Replace the clocks of wall time and processor time by values that a model advances."""
    monkeypatch.setattr("haq_lab.measure.latency.time.perf_counter", lambda: wall[0])
    monkeypatch.setattr("haq_lab.measure.timing.time.thread_time", lambda: cpu[0])


class Steady(nn.Module):
    """A model whose steps take a time that is drawn around a mean. Wall time is longer if the thread waits."""

    def __init__(self, seconds: float, wall: list[float], cpu: list[float], waiting: float = 1.0):
        super().__init__()
        self.seconds, self.wall, self.cpu, self.waiting = seconds, wall, cpu, waiting
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor, cache, **options):
        self.cpu[0] += self.seconds
        self.wall[0] += self.seconds * self.waiting
        return SimpleNamespace(logits=torch.zeros(1, tokens.shape[1], 5), cache=object())


def test_against_full_precision_the_ratio_is_that_of_processor_times(full, monkeypatch):
    wall, cpu = [0.0], [0.0]
    clocks(monkeypatch, wall, cpu)
    reference = Steady(0.06, wall, cpu, waiting=5)
    study = dataclasses.replace(full, whole=Steady(0.02, wall, cpu), reference=lambda: reference, tables={})
    metrics = measured(study, **QUICK, against="none")
    for phase in ("prefill", "decode"):
        assert metrics[f"latency.speed_vs_fp.{phase}"] == pytest.approx(3)
        assert metrics[f"latency.speed_vs_fp.{phase}.stderr"] == pytest.approx(0, abs=1e-9)
    assert metrics["latency.wall_over_cpu"] == pytest.approx(1), "the reference's waiting is not the model's"
    table = study.tables["latency"]
    assert list(table) == ["phase", "repetition", "ms", "cpu_ms", "reference_ms", "reference_cpu_ms"]
    assert list(table["phase"]) == ["prefill", *["decode"] * 3] * 2
    assert list(table["repetition"]) == [0] * 4 + [1] * 4
    for column, expected in {"ms": 20, "cpu_ms": 20, "reference_ms": 300, "reference_cpu_ms": 60}.items():
        assert list(table[column]) == pytest.approx([expected] * 8)


def test_with_offloading_the_ratio_contains_the_waiting(full, monkeypatch):
    wall, cpu = [0.0], [0.0]
    clocks(monkeypatch, wall, cpu)
    model, reference = Steady(0.02, wall, cpu, waiting=3), Steady(0.03, wall, cpu)
    study = dataclasses.replace(full, whole=model, reference=lambda: reference, tables={}, offloaded=True)
    metrics = measured(study, **QUICK, against="none")
    assert metrics["latency.speed_vs_fp.decode"] == pytest.approx(0.5)
    assert not {"latency.wall_over_cpu", "latency.spread"} & set(metrics), "waiting for experts is no disturbance"


def test_waiting_for_a_processor_is_recorded(full, monkeypatch):
    wall, cpu = [0.0], [0.0]
    clocks(monkeypatch, wall, cpu)
    study = dataclasses.replace(full, whole=Steady(0.02, wall, cpu, waiting=1.4), tables={})
    metrics = measured(study, **QUICK)
    assert metrics["latency.wall_over_cpu"] == pytest.approx(1.4)
    assert metrics["latency.spread"] == pytest.approx(0)
    assert not any(name.startswith("latency.speed_vs_fp") for name in metrics)


def test_the_error_of_the_ratio_comes_from_the_repetitions():
    """Each repetition has its own ratio, and its steps are no independent values."""
    own = np.full((3, 1, 5), 0.01)
    reference = own * np.array([2.0, 4.0, 8.0])[:, None, None]
    metrics = _speed_over_reference(np.concatenate([own, reference], axis=1))
    assert metrics["latency.speed_vs_fp.decode"] == pytest.approx(4)
    assert metrics["latency.speed_vs_fp.decode.stderr"] == pytest.approx(4 * np.log(2) / np.sqrt(3))
    single = _speed_over_reference(np.concatenate([own, reference], axis=1)[:1])
    assert set(single) == {"latency.speed_vs_fp.prefill", "latency.speed_vs_fp.decode"}


def test_it_waits_for_a_quiet_moment_before_the_warm_up(full, monkeypatch):
    events = []
    watched = Watched(full.whole)
    watched.register_forward_pre_hook(lambda *arguments: events.append("forward"))

    def wait(seconds, report):
        events.append(f"waits {seconds}")
        return 12.5

    monkeypatch.setattr("haq_lab.measure.latency.wait_until_quiet", wait)
    metrics = measured(dataclasses.replace(full, whole=watched), **QUICK, wait=60)
    assert events[:2] == ["waits 60.0", "forward"]
    assert metrics["latency.machine.waited_s"] == 12.5
    assert "latency.machine.waited_s" not in measured(dataclasses.replace(full, whole=watched), **QUICK)


def test_latency_against_full_precision_needs_its_weights():
    checkpoint = ["model=quantized", "model.path=x", "quantizer=none", "measure=[latency]"]
    with pytest.raises(UserError, match=r"^measure.latency.against: none has no effect .*against=null\.$"):
        build(compose_run([*checkpoint, "measure.latency.against=none"])[0])
    with pytest.raises(UserError, match=r"measure.latency.against: .*'rtn'"):
        build(compose_run(["measure=[latency]", "measure.latency.against=rtn"])[0])
