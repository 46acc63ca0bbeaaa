"""Figures of a run: what they are drawn from, and that they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from haq_lab.results.figures import comparison_figure, layer_figure, mean_over_experts


def _layers(error: float | None) -> pd.DataFrame:
    names = ["self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]
    rows = [
        {
            "layer": layer,
            "linear": name,
            "output_error": error and error * number,
            "error_rtn": None,
            "smoothing_strength": None,
        }
        for layer in range(2)
        for number, name in enumerate(names)
    ]
    return pd.DataFrame(rows)


def test_experts_are_one_kind():
    table = mean_over_experts(_layers(2.0))
    assert list(table["linear"]) == ["self_attn.q_proj", "mlp.experts.up_proj"] * 2
    assert list(table["output_error"]) == [0.0, 3.0] * 2
    assert table["smoothing_strength"].isna().all()


def test_a_run_without_errors_has_its_figure(tmp_path):
    assert layer_figure(_layers(None), tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def _drawn(runs: pd.DataFrame, monkeypatch):
    """The panel of a figure of one dataset."""
    drawn = []
    monkeypatch.setattr("haq_lab.results.figures.save", lambda figure, path: drawn.append(figure) or path)
    comparison_figure(runs, Path("a.png"))
    (panel,) = drawn[0].axes
    return panel


def test_runs_of_one_name_have_bars_of_their_own_and_missing_texts_are_named(monkeypatch):
    runs = pd.DataFrame({"quantizer": ["haq", "haq", "rtn", "gptq"], "change_percent.c4": [1.0, 2.0, None, None]})
    runs = runs.assign(folder="a", quantized=True)
    runs["null.perplexity.c4"] = [None, None, None, "too large"]
    panel = _drawn(runs, monkeypatch)
    assert [round(bar.get_width(), 3) for bar in panel.patches] == [0, 0, 1, 2]
    assert panel.get_xlabel() == "change of perplexity from full precision, %"
    assert len({bar.get_y() for bar in panel.patches}) == 4
    assert [text.get_text() for text in panel.texts] == ["not evaluated", "null (too large)", "+1.00 %", "+2.00 %"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["RTN", "GPTQ", "HAQ", "HAQ"]


def test_the_label_of_a_gain_does_not_cover_the_runs_name(monkeypatch):
    runs = pd.DataFrame({"quantizer": ["rtn", "haq"], "change_percent.c4": [-2.0, 1.0]})
    runs = runs.assign(folder="a", quantized=True)
    runs["dlnppl.c4.low"], runs["dlnppl.c4.high"] = np.log1p([-0.03, 0.005]), np.log1p([-0.01, 0.02])
    assert [text.xy[0] for text in _drawn(runs, monkeypatch).texts] == pytest.approx([0, 2])


def test_whiskers_are_intervals_and_a_large_bar_hides_nothing(monkeypatch):
    runs = pd.DataFrame({"quantizer": ["none", "rtn", "smoothquant", "haq"], "change_percent.c4": [0, 140, 3, 0.5]})
    runs = runs.assign(folder="a", quantized=runs["quantizer"] != "none")
    runs["dlnppl.c4.low"] = np.log1p([np.nan, 1.3, 0.02, 0.004])
    runs["dlnppl.c4.high"] = np.log1p([np.nan, 1.5, 0.04, 0.006])
    panel = _drawn(runs, monkeypatch)
    assert [label.get_text() for label in panel.get_yticklabels()] == ["RTN", "SmoothQuant", "HAQ"]
    assert panel.get_xscale() == "asinh"
    assert panel.get_xlabel().endswith("(whiskers: 95 % interval; ±: standard error)")
    ends = panel.collections[0].get_segments()
    assert np.ravel([segment[:, 0] for segment in ends]) == pytest.approx([130, 150, 2, 4, 0.4, 0.6])
