"""Figures of a run: what they are drawn from, and that they are drawn."""

from __future__ import annotations

import pandas as pd

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


def test_runs_of_one_name_have_bars_of_their_own_and_missing_texts_are_named(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("haq_lab.results.figures.save", lambda figure, path: drawn.append(figure) or path)
    runs = pd.DataFrame({"name": ["same", "same", "other"], "change_percent.c4": [1.0, 2.0, None]})
    runs = pd.concat([runs, pd.DataFrame([{"name": "null", "null.perplexity.c4": "too large"}])], ignore_index=True)
    comparison_figure(runs, tmp_path / "a.png")
    (panel,) = drawn[0].axes
    assert [round(bar.get_width(), 3) for bar in panel.patches] == [1, 2, 0, 0]
    assert len({bar.get_y() for bar in panel.patches}) == 4
    assert [text.get_text() for text in panel.texts] == ["+1.00 %", "+2.00 %", "not evaluated", "null (too large)"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["same", "same", "other", "null"]
