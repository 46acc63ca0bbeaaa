"""How a metric is shown: its label, its unit, and whether less of it is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["less", "more", ""]


@dataclass(frozen=True)
class Metric:
    """Args:
    label: Column head.
    form: Format of a value, already multiplied by `factor`.
    better: Which way is better; empty: neither.
    """

    label: str
    form: str = "{:,.4g}"
    factor: float = 1
    better: Better = ""

    def text(self, value: float) -> str:
        """A value as it is printed."""
        return self.form.format(value * self.factor)


SHOWN = {
    "memory.weights_bytes": Metric("weights, MB", "{:,.1f}", 1e-6, "less"),
    "memory.peak_rss_bytes": Metric("peak RAM, MB", "{:,.0f}", 1e-6, "less"),
    "memory.checkpoint_bytes": Metric("checkpoint, MB", "{:,.0f}", 1e-6, "less"),
    "latency.prefill_ms": Metric("prefill, ms", "{:,.1f}", 1, "less"),
    "latency.decode_ms_per_token.mean": Metric("decode, ms/token", "{:,.2f}", 1, "less"),
    "latency.decode_ms_per_token.p95": Metric("decode p95, ms", "{:,.2f}", 1, "less"),
    "latency.tokens_per_s": Metric("tokens/s", "{:,.1f}", 1, "more"),
    "offload.hit_rate_pairs": Metric("hit rate, %", "{:.2f}", 100, "more"),
    "offload.hit_rate_layer_std": Metric("its std over layers", "{:.3f}"),
    "offload.bytes_moved": Metric("moved, MB", "{:,.0f}", 1e-6, "less"),
    "offload.fast_tier_bytes": Metric("fast tier, MB", "{:,.1f}", 1e-6),
    "quantizer.dynamic_share": Metric("dynamic linears, %", "{:.1f}", 100),
    "quantizer.fallback_modules": Metric("fallbacks", "{:.0f}"),
}
BY_DATASET = {
    "perplexity": ("perplexity", "{:,.4f}", "less"),
    "kl": ("KL, nats/token", "{:.5f}", "less"),
    "token_agreement": ("agreement, %", "{:.2f}", "more"),
}


def columns(names: list[str]) -> dict[str, Metric]:
    """The metrics among `names` that tables show, in their order: by dataset first, then tasks, memory, latency."""
    shown: dict[str, Metric] = {}
    datasets = [name.partition(".")[2] for name in names if name.startswith("perplexity.")]
    for dataset in datasets:
        for kind, (label, form, better) in BY_DATASET.items():
            factor = 100 if kind == "token_agreement" else 1
            shown[f"{kind}.{dataset}"] = Metric(f"{dataset} {label}", form, factor, better)  # type: ignore[arg-type]
    shown |= {name: _task(name) for name in names if name.startswith("lm_eval.") and "stderr" not in name}
    shown |= SHOWN
    return {name: metric for name, metric in shown.items() if name in names}


def _task(name: str) -> Metric:
    _, task, measured = name.split(".", 2)
    less = any(word in measured for word in ("perplexity", "bits_per_byte", "mse", "brier"))
    return Metric(f"{task} {measured}", "{:,.4f}", 1, "less" if less else "more")
