"""Define how each metric is shown: its label, its unit and its direction.

`METRICS` is the only table of the project's metrics. The class of a user's own measure declares its metrics in the
attribute `metrics`, a dictionary of the same form. Each run stores them in `results.json`, and the report reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

Direction = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Metric:
    """How tables show a metric.

    Args:
        label: Name of the quantity. Each `{}` becomes the part of the metric's name that a `*` matches.
        unit: Unit of the shown values.
        direction: Which values are better. Empty if neither.
        decimals: Digits after the decimal point. None: four significant digits.
        factor: Number of units that one recorded unit has, such as 1e-6 for bytes shown in MB.
        baseline: Metric of the same run that the value is compared with in %. `unquantised` stands for the same metric
            of the unquantised run. Empty: no comparison.
        depends_on: What must be equal if the value is compared with a published one: the evaluated text or the machine.
        column: Tables with a column for the metric: all of them, the report's, or none but the table of one run.

    Example:
        >>> Metric("weights", "MB", "lower", decimals=1, factor=1e-6).format(2_500_000)
        '2.5'
    """

    label: str
    unit: str = ""
    direction: Direction = ""
    decimals: Annotated[int, Field(ge=0, le=15)] | None = None
    factor: float = 1
    baseline: str = ""
    depends_on: Literal["text", "machine"] = "machine"
    column: Literal["all", "report", "none"] = "report"

    @property
    def head(self) -> str:
        """Label and unit, as the head of a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def format(self, value: float) -> str:
        """Format a recorded value in the metric's unit, without the unit."""
        spec = ",.4g" if self.decimals is None else f",.{self.decimals}f"
        return format(value * self.factor, spec)

    def named(self, parts: Iterable[str]) -> Metric:
        """Return the metric with `parts` in place of each `{}` of its label and each `*` of its baseline."""
        label, baseline = self.label, self.baseline
        for part in parts:
            label, baseline = label.replace("{}", part, 1), baseline.replace("*", part, 1)
        return replace(self, label=label, baseline=baseline)


UNQUANTISED = "unquantised"  # value of `Metric.baseline`
_MB: dict[str, Any] = {"unit": "MB", "factor": 1e-6}
_TEXT: dict[str, Any] = {"depends_on": "text", "decimals": 4}

# The first match counts. `*` stands for a dataset, a task or a machine.
METRICS: dict[str, Metric] = {
    # Errors and percentiles, which tables show beside the metric itself.
    "*.stderr": Metric("{} standard error", column="none"),
    "dlnppl.*.*": Metric("{} change of ln perplexity, {} end of its interval", "nats/token", column="none", decimals=5),
    "kl.*.*": Metric("{} KL, {} over the tokens", "nats/token", "", 5, depends_on="text", column="none"),
    "perplexity.*": Metric("{} perplexity", "", "lower", baseline="perplexity_fp.*", column="all", **_TEXT),
    "perplexity_fp.*": Metric("{} perplexity in full precision", "", "lower", column="none", **_TEXT),
    "perplexity_fp_no_prefix.*": Metric(
        "{} perplexity in full precision without the prefix", "", "lower", column="none", **_TEXT
    ),
    "perplexity_smoothed_fp.*": Metric("{} perplexity after smoothing", "", "lower", column="none", **_TEXT),
    "dlnppl.*": Metric("{} change of ln perplexity", "nats/token", "", 5, depends_on="text", column="none"),
    "kl.*": Metric("{} KL", "nats/token", "lower", 5, depends_on="text"),
    "token_agreement.*": Metric("{} agreement", "%", "higher", 2, 100, depends_on="text"),
    "lm_eval.*_stderr": Metric("{} standard error", column="none"),
    **{
        f"lm_eval.*.*{name}*": Metric(f"{{}} {{}}{name}{{}}", "", "lower", 4, baseline=UNQUANTISED)
        for name in ("perplexity", "bits_per_byte", "mse", "brier")
    },
    "lm_eval.*.*": Metric("{} {}", "", "higher", 4, baseline=UNQUANTISED),
    "memory.weights_bytes": Metric(
        "weights", direction="lower", decimals=1, baseline="memory.weights_fp16_bytes", column="all", **_MB
    ),
    "memory.weights_fp16_bytes": Metric("weights of the whole model in fp16", decimals=1, column="none", **_MB),
    "memory.running_bytes": Metric("RAM to run", direction="lower", decimals=0, baseline=UNQUANTISED, **_MB),
    "memory.running_private_bytes": Metric("private part of the RAM to run", decimals=0, column="none", **_MB),
    "memory.running_shared_bytes": Metric("shared part of the RAM to run", decimals=0, column="none", **_MB),
    "memory.running_device_bytes": Metric("GPU memory to run", direction="lower", decimals=0, **_MB),
    "memory.libraries_bytes": Metric("RAM of Python and the libraries", decimals=0, column="none", **_MB),
    # No direction and no baseline: the peak includes the quantization, which not every run does itself.
    "memory.peak_rss_bytes": Metric("peak RAM of the run", decimals=0, column="none", **_MB),
    "memory.peak_device_bytes": Metric("peak GPU memory", decimals=0, column="none", **_MB),
    "memory.checkpoint_bytes": Metric("checkpoint", direction="lower", decimals=0, **_MB),
    "latency.prefill_ms": Metric("prefill", "ms", "lower", 1, baseline=UNQUANTISED, column="all"),
    "latency.decode_ms_per_token.mean": Metric("decode", "ms/token", "lower", 2, baseline=UNQUANTISED, column="all"),
    "latency.decode_ms_per_token.p95": Metric("decode p95", "ms", "lower", 2, baseline=UNQUANTISED),
    "latency.tokens_per_s": Metric("throughput", "tokens/s", "higher", 1, baseline=UNQUANTISED),
    "latency.speed_vs_fp.prefill": Metric("prefill", "x fp32", "higher", 2, column="all"),
    "latency.speed_vs_fp.decode": Metric("decode", "x fp32", "higher", 2, column="all"),
    "latency.threads": Metric("threads", decimals=0, column="none"),
    "latency.wall_over_cpu": Metric("wall time over processor time", decimals=2, column="none"),
    "latency.spread": Metric("95th percentile of a decoded token over the median, minus 1", decimals=2, column="none"),
    "latency.machine.others_share": Metric("processors used by others", "%", "", 0, 100, column="none"),
    "latency.machine.load_1min": Metric("load of the last minute", decimals=2, column="none"),
    "latency.machine.cpu_mhz": Metric("clock of the processors", "MHz", "", 0, column="none"),
    "latency.machine.gpu_mhz": Metric("clock of the GPU", "MHz", "", 0, column="none"),
    "latency.machine.throttled": Metric("times that a core was slowed because of heat", decimals=0, column="none"),
    "latency.machine.waited_s": Metric("waited for a quiet moment", "s", "", 1, column="none"),
    "offload.hit_rate_pairs": Metric("hit rate", "%", "higher", 2, 100, column="all"),
    "offload.hit_rate_layer_std": Metric("standard deviation of the hit rate over layers", "", "", 3),
    "offload.bytes_moved": Metric("moved", direction="lower", decimals=0, column="all", **_MB),
    "offload.bytes_moved_per_token": Metric("moved", "MB/token", "lower", 3, 1e-6),
    "offload.waited_ms_per_token": Metric("waited", "ms/token", "lower", 3),
    "offload.tokens": Metric("tokens that offloading counted", decimals=0, column="none"),
    "offload.fast_tier_bytes": Metric("fast tier", decimals=1, **_MB),
    "quantizer.dynamic_share": Metric("dynamic linears", "%", "", 1, 100),
    "quantizer.share_4bit": Metric("weights in 4 bits", "%", "", 1, 100),
    "quantizer.bits_per_weight": Metric("bits of a weight", "", "", 2),
    "quantizer.float_share": Metric("parameters of the layers in float", "%", "", 2, 100, column="none"),
    "quantizer.fallback_modules": Metric("fallbacks", decimals=0),
}


def find_metric(name: str, declared: Mapping[str, Metric] | None = None) -> Metric | None:
    """Return how a metric is shown, or None if neither the project nor the run declares it.

    Args:
        name: Full name of the metric.
        declared: Metrics of the user's own measures, in the form of `METRICS`.
    """
    for pattern, metric in (METRICS | dict(declared or {})).items():
        if match := _match(pattern, name):
            return metric.named(match.groups())
    return None


def declared_metrics(measures: Iterable[object]) -> dict[str, dict[str, Any]]:
    """Return the metrics that measures declare in their attribute `metrics`, as plain dictionaries for JSON."""
    declared = (getattr(measure, "metrics", {}) for measure in measures)
    return {name: asdict(metric) for metrics in declared for name, metric in metrics.items()}


def table_columns(names: Iterable[str], declared: Mapping[str, Metric] | None = None) -> dict[str, Metric]:
    """Return the metrics among `names` that the report shows, in the order of `METRICS` and then of `declared`.

    Args:
        names: Full names of metrics. Other names are skipped.
        declared: Metrics of the user's own measures, in the form of `METRICS`.
    """
    found = {name: metric for name in names if (metric := find_metric(name, declared)) and metric.column != "none"}
    texts = [name.partition(".")[2] for name in found if name.startswith("perplexity.")]
    by_text = [f"{kind}.{text}" for text in texts for kind in ("perplexity", "kl", "token_agreement")]
    order = {name: place for place, name in enumerate(by_text)}
    patterns = list(METRICS | dict(declared or {}))
    place = {name: next((i for i, p in enumerate(patterns) if _match(p, name)), 0) for name in found}
    return dict(sorted(found.items(), key=lambda item: (item[0] not in order, order.get(item[0], place[item[0]]))))


def _match(pattern: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "(.*?)"), name)
