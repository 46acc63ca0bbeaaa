"""Every metric has a label, a unit and a direction in one table, and a user's measure can declare its own."""

from __future__ import annotations

from typing import ClassVar

import pytest

from haq_lab.measure.metrics import METRICS, Metric, declared_metrics, find_metric, table_columns


@pytest.mark.parametrize(
    ("name", "head", "direction", "value", "text"),
    [
        ("perplexity.c4", "c4 perplexity", "lower", 30.12345, "30.1234"),
        ("kl.c4.p99", "c4 KL, p99 over the tokens, nats/token", "", 0.123456, "0.12346"),
        ("dlnppl.c4.low", "c4 change of ln perplexity, low end of its interval, nats/token", "", 0.123456, "0.12346"),
        ("memory.weights_bytes", "weights, MB", "lower", 2_540_000, "2.5"),
        ("offload.hit_rate_pairs", "hit rate, %", "higher", 0.5, "50.00"),
        ("latency.decode_ms_per_token.mean", "decode, ms/token", "lower", 1.5, "1.50"),
        ("lm_eval.arc.acc", "arc acc", "higher", 0.25, "0.2500"),
        ("lm_eval.wiki.word_perplexity", "wiki word_perplexity", "lower", 9.0, "9.0000"),
    ],
)
def test_a_metric_has_its_label_unit_and_direction(name, head, direction, value, text):
    metric = find_metric(name)
    assert metric is not None
    assert (metric.head, metric.direction, metric.format(value)) == (head, direction, text)


def test_every_baseline_is_a_metric_of_the_table():
    assert {metric.baseline for metric in METRICS.values()} <= {"", "unquantised", *METRICS}
    assert find_metric("perplexity.c4").baseline == "perplexity_fp.c4"


def test_a_users_measure_declares_its_metrics():
    class Energy:
        metrics: ClassVar = {"energy.*_j": Metric("{} energy", "J", "lower", 1)}

    (recorded,) = declared_metrics([Energy(), object()]).items()
    declared = {recorded[0]: Metric(**recorded[1])}
    assert find_metric("energy.decode_j") is None
    assert find_metric("energy.decode_j", declared).head == "decode energy, J"
    assert list(table_columns(["energy.decode_j", "kl.c4", "perplexity.c4", "unknown"], declared)) == [
        *("perplexity.c4", "kl.c4", "energy.decode_j"),
    ]


def test_standard_errors_are_not_columns():
    assert list(table_columns(["lm_eval.arc.acc", "lm_eval.arc.acc_stderr", "perplexity_fp.c4"])) == ["lm_eval.arc.acc"]
