"""Figures of a run: what they are drawn from, and that they are drawn."""

from __future__ import annotations

import pandas as pd

from haq_lab.results.figures import layer_figure, mean_over_experts


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
