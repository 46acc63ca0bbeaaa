"""Perplexity is transformers' own loss, and the distances are distances."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from haq_lab.measure.perplexity import Perplexity, score_windows, summary
from tests.models.test_layerwise import whole_of


def perplexity_of(model, windows) -> float:
    """By transformers' own loss, a window at a time."""
    losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))


def test_full_precision_equals_the_whole_models(full, windows):
    metrics = Perplexity()(full)
    assert set(metrics) == {"perplexity.text", "perplexity.text.stderr", "perplexity_fp.text"}
    assert metrics["perplexity_fp.text"] == pytest.approx(perplexity_of(whole_of(full.model.folder), windows), rel=1e-5)
    assert metrics["perplexity.text"] == metrics["perplexity_fp.text"]


def test_quantized_equals_the_assembled_models(quantized, windows):
    metrics = Perplexity()(quantized)
    fp, assembled = perplexity_of(whole_of(quantized.model.folder), windows), perplexity_of(quantized.whole, windows)
    assert metrics["perplexity_fp.text"] == pytest.approx(fp, rel=1e-5)
    assert metrics["perplexity_smoothed_fp.text"] == pytest.approx(fp, rel=1e-4)
    assert metrics["perplexity.text"] == pytest.approx(assembled, rel=1e-3)
    assert abs(assembled / fp - 1) > 0.002


def test_distances_equal_direct_computation(quantized, windows):
    metrics = Perplexity()(quantized)
    hidden = quantized.passed.hidden["text"]
    fp, quant = (F.log_softmax(quantized.model.head(hidden[level]), -1)[:, :-1] for level in ("fp", "quantized"))
    divergence = (fp.exp() * (fp - quant)).sum(-1).mean()
    agreement = (fp.argmax(-1) == quant.argmax(-1)).float().mean()
    assert metrics["kl.text"] == pytest.approx(float(divergence), rel=1e-4)
    assert metrics["token_agreement.text"] == pytest.approx(float(agreement))
    assert metrics["kl.text"] > 0
    assert 0 < metrics["token_agreement.text"] < 1


def test_a_model_is_at_no_distance_from_itself(full, windows):
    hidden = full.passed.hidden["text"]["fp"]
    scored = score_windows(full.model, windows, {"fp": hidden, "smoothed": hidden, "quantized": hidden})
    metrics = summary(*scored, "text")
    assert metrics["kl.text"] == pytest.approx(0, abs=1e-6)
    assert metrics["token_agreement.text"] == 1
    assert metrics["perplexity.text"] == metrics["perplexity_fp.text"]


def test_uniform_predictions_have_the_vocabularys_perplexity(full, windows):
    hidden = torch.zeros_like(full.passed.hidden["text"]["fp"])
    if full.model.family.model_type == "opt":
        pytest.skip("OPT's final norm has a bias")
    metrics = summary(*score_windows(full.model, windows, {"fp": hidden}), "text")
    assert metrics["perplexity.text"] == pytest.approx(257, rel=1e-4)


def test_the_table_has_every_window(quantized, windows):
    metrics = Perplexity()(quantized)
    table = quantized.tables["windows"]
    assert list(table.columns) == [
        *("data", "window", "document", "tokens", "nll_fp", "nll_smoothed_fp", "nll", "kl", "token_agreement")
    ]
    assert len(table) == len(windows)
    for number, window in enumerate(windows):
        loss = float(quantized.whole(window[None], labels=window[None]).loss)
        assert table["nll"][number] == pytest.approx(loss, rel=1e-3)
    assert math.exp(table["nll"].mean()) == pytest.approx(metrics["perplexity.text"])


def test_errors_are_those_of_scipy(quantized):
    metrics = Perplexity()(quantized)
    table = quantized.tables["windows"]
    difference = table["nll"] - table["nll_fp"]
    stderr = scipy.stats.sem(difference)
    low, high = scipy.stats.t.interval(0.95, len(table) - 1, difference.mean(), stderr)
    assert metrics["dlnppl.text.stderr"] == pytest.approx(stderr)
    assert (metrics["dlnppl.text.low"], metrics["dlnppl.text.high"]) == pytest.approx((low, high))
    assert metrics["kl.text.stderr"] == pytest.approx(scipy.stats.sem(table["kl"]))
    relative = scipy.stats.sem(table["nll"])
    assert metrics["perplexity.text.stderr"] == pytest.approx(metrics["perplexity.text"] * relative)


def test_percentiles_are_over_tokens(quantized, windows):
    hidden = quantized.passed.hidden["text"]
    fp, quant = (F.log_softmax(quantized.model.head(hidden[level]), -1)[:, :-1] for level in ("fp", "quantized"))
    each = (fp.exp() * (fp - quant)).sum(-1).flatten()
    metrics = Perplexity()(quantized)
    found = [metrics[f"kl.text.{name}"] for name in ("median", "p99", "max")]
    assert found == pytest.approx([float(each.double().quantile(q)) for q in (0.5, 0.99, 1)], rel=1e-3)


def test_a_single_window_has_no_error(quantized, windows):
    hidden = {level: states[:1] for level, states in quantized.passed.hidden["text"].items()}
    metrics = summary(*score_windows(quantized.model, windows[:1], hidden), "text")
    assert "kl.text" in metrics
    assert not [name for name in metrics if name.endswith(("stderr", "low", "high"))]
