"""What the path model is fitted on against plain loops, and that it learns what there is to learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from haq_lab.offload.policies import path_model
from haq_lab.offload.policies.path_model import (
    HORIZONS,
    MAX_AGE,
    _features,
    _Fit,
    _waits,
    fit_path_model,
    log_odds,
    path_limitation,
)
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.routing.statistics import frequencies


def test_features_and_waits_are_what_they_say(make_trace):
    trace = make_trace(tokens=60, layers=2, experts=6)
    usage = frequencies(trace).astype(np.float32)
    features, waits = _features(trace.experts, usage, HORIZONS), _waits(trace.experts, 6)
    for layer, expert in np.ndindex(2, 6):
        used = (trace.experts[:, layer] == expert).any(-1)
        average, last = np.repeat(usage[layer, expert], len(HORIZONS)), -MAX_AGE
        for token in range(60):
            np.testing.assert_allclose(features[token, layer, expert, :-1], log_odds(average), rtol=1e-3, atol=1e-4)
            age = min(token - last, MAX_AGE)
            assert features[token, layer, expert, -1] == pytest.approx(np.log(1 + age), rel=1e-5)
            average, last = average + (used[token] - average) / HORIZONS, token if used[token] else last
            ahead = np.flatnonzero(used[token:])
            # One visit ahead of the trace's end is as far as MAX_AGE: not seen to end.
            assert waits[token, layer, expert] == (ahead[0] + 1 if len(ahead) else MAX_AGE)


def test_a_path_is_known_up_to_the_current_layer(make_trace):
    """Against plain loops: experts up to the current layer get the choices up to there, later ones all choices."""
    trace = make_trace(tokens=60, layers=3, experts=4)
    fit = _Fit(trace.experts, frequencies(trace).astype(np.float32), np.random.default_rng(0), with_path=True)
    with torch.no_grad():
        fit.path.copy_(torch.randn(fit.path.shape, generator=torch.Generator().manual_seed(0)))
        rows = torch.arange(10, 20)
        logits = fit._path_logits(rows)
    current = np.random.default_rng(0).integers(0, 3, (10, 1))
    weights, path = fit.path.detach().view(3, 4, 2, 3, 4), (fit.chosen - fit.mean).view(-1, 3, 4)
    for number, kind, layer, expert in np.ndindex(10, 2, 3, 4):
        now = int(current[number, 0])
        known = now + 1 if layer <= now else 3
        expected = (path[9 + number, :known] * weights[:known, :, kind, layer, expert]).sum()
        assert float(logits[kind, number, layer, expert]) == pytest.approx(float(expected), abs=1e-4)


def test_a_choice_unknown_adds_nothing(make_trace):
    trace = make_trace(tokens=300, layers=3, experts=4)
    model = fit_path_model(trace, steps=30)
    rows = model.path.reshape(3, 4, -1)
    mean = (frequencies(trace)[:, :, None] * rows).sum(1)
    np.testing.assert_allclose(mean, 0, atol=1e-5)


def test_a_large_model_has_no_path_and_says_so(make_trace, monkeypatch):
    """The limit is lowered from 2,000 experts. Eviction works without a path, by recency."""
    trace = make_trace(tokens=200, layers=3, experts=4)
    assert path_limitation(8, 250) is None
    assert "2,008 experts" in path_limitation(8, 251)
    monkeypatch.setattr("haq_lab.offload.policies.path_model.MAX_PATH_EXPERTS", 11)
    model = fit_path_model(trace, steps=10)
    assert model.path.shape == (12, 2, 0)
    zero = replace(model, path=np.zeros((12, 2, 12), np.float32))
    resident = place("uniform", trace, 6)
    without, zeros = (make_policy("haq", resident, trace, path_model=each).replay(trace) for each in (model, zero))
    assert without.fetched == zeros.fetched
    np.testing.assert_array_equal(without.by_layer, zeros.by_layer)


@pytest.mark.parametrize(("tokens", "first"), [(200, 100), (2600, 1024)])
def test_tokens_before_the_averages_have_settled_are_not_fitted(make_trace, monkeypatch, tokens, first):
    drawn = []
    loss = path_model._Fit._loss
    monkeypatch.setattr(path_model._Fit, "_loss", lambda fit, rows: drawn.append(rows) or loss(fit, rows))
    fit_path_model(make_trace(tokens=tokens, layers=1, experts=4), steps=30)
    rows = torch.cat(drawn)
    assert first <= rows.min() < first + tokens // 20
    assert rows.max() < tokens
