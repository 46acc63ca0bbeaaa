"""Test that every printed metric has its unit."""

from __future__ import annotations

import pytest

from haq_lab.utils.console import format_metric, show_results


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("memory.weights_bytes", 220_040_000.0, "220.0 MB"),
        ("offload.bytes_moved", 1_234_567_890.0, "1,234.6 MB"),
        ("simulated.rtx3060_12g.offload.bytes_moved", 5e6, "5.0 MB"),
        ("perplexity.wikitext2", 22.50412, "22.5041"),
        ("latency.decode_ms_per_token.mean", 56.123, "56.12"),
        ("lm_eval.task.bits_per_byte", 1.234567, "1.2346"),
        ("offload.hit_rate_pairs", 0.773912, "0.77391"),
    ],
)
def test_a_metric_has_its_unit(metric, value, text):
    assert format_metric(metric, value) == text


def test_no_name_is_cut_where_nothing_limits_the_width(tmp_path, capsys):
    name = "simulated.jetson_orin_64g.latency.decode_ms_per_token.mean"
    run = {"model": "smol_moe", "quantizer": "rtn"}
    perplexities = {"perplexity_fp.python_docs": 4000.0, "perplexity.python_docs": 4400.0}
    show_results({"run": run, "metrics": {**perplexities, name: 12.5, "time.load_s": 3.0}}, tmp_path)
    shown = capsys.readouterr().out
    assert name in shown
    assert "4,400.0000  (+10.00 %)" in shown
    assert "time.load_s" not in shown
