"""Test the table of one run: each metric with its unit, null metrics, own metrics and limitations."""

from __future__ import annotations

import pytest

from haq_lab.results.show_run import format_metric, show_results


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("memory.weights_bytes", 220_040_000.0, "220.0 MB"),
        ("offload.bytes_moved", 1_234_567_890.0, "1,235 MB"),
        ("simulated.rtx3060_12g.offload.bytes_moved", 5e6, "5 MB"),
        ("perplexity.wikitext2", 22.50412, "22.5041"),
        ("latency.decode_ms_per_token.mean", 56.123, "56.12 ms/token"),
        ("simulated.rtx3060_12g.latency.prefill_ms", 1234.56, "1,234.6 ms"),
        ("unknown.thing", 0.123456789, "0.12346"),
        ("lm_eval.task.bits_per_byte", 1.234567, "1.2346"),
        ("offload.hit_rate_pairs", 0.773912, "77.39 %"),
    ],
)
def test_a_metric_has_its_unit(metric, value, text):
    assert format_metric(metric, value) == text


def test_no_name_is_cut_where_nothing_limits_the_width(tmp_path, capsys):
    name = "simulated.jetson_orin_64g.latency.decode_ms_per_token.mean"
    run = {"model": "smol_moe", "quantizer": "rtn"}
    config = {"quantizer": {"activations": "static"}}
    perplexities = {"perplexity_fp.python_docs": 4000.0, "perplexity.python_docs": 4400.0}
    metrics = {**perplexities, name: 12.5, "time.load_s": 3.0}
    show_results({"run": run, "config": config, "metrics": metrics}, tmp_path)
    shown = capsys.readouterr().out
    assert "smol_moe  rtn, static" in shown
    assert name in shown
    assert "4,400.0000  (+10.00 %)" in shown
    assert "time.load_s" not in shown


def test_own_metrics_null_metrics_and_limitations_are_shown(tmp_path, capsys):
    own = {"energy.*_j": {"label": "{} energy", "unit": "J", "direction": "lower", "decimals": 1}}
    run = {"model": "m", "quantizer": "rtn", "own_metrics": own, "offload_limitation": "offload=haq ignores the path."}
    metrics = {"energy.decode_j": 2.25, "perplexity.c4": None}
    show_results({"run": run, "metrics": metrics, "not_finite": {"perplexity.c4": "too large"}}, tmp_path)
    shown = capsys.readouterr().out
    assert "2.2 J" in shown
    assert "null (too large)" in shown
    assert "offload=haq ignores the path." in shown


def test_times_of_a_busy_machine_are_marked_and_the_advice_follows(tmp_path, capsys):
    run = {"model": "m", "quantizer": "rtn"}
    metrics = {
        "latency.prefill_ms": 30.0,
        "latency.speed_vs_fp.prefill": 3.5,
        "latency.speed_vs_fp.prefill.stderr": 0.1,
    }
    show_results({"run": run, "metrics": metrics | {"latency.wall_over_cpu": 1.01}}, tmp_path)
    assert "~" not in capsys.readouterr().out
    show_results({"run": run, "metrics": metrics | {"latency.wall_over_cpu": 1.4}}, tmp_path)
    shown = capsys.readouterr().out
    assert "~30.0 ms" in shown
    assert "~3.50 x fp32  (± 0.10 x fp32)" in shown
    assert "~ the machine was busy when latency was measured: wall time exceeds processor time by 40 %." in shown
    assert "measure.latency.wait=60 waits for a quiet moment" in shown
