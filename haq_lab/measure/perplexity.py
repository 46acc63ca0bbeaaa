"""Measure perplexity at three points of the pass, and how far quantization changes the predictions.

Perplexity is per token, as GPTQ and SmoothQuant publish it: exp of the mean negative log-likelihood over all tokens
of a window except its first. The windows do not overlap. A prefix is no part of a window, so it is never scored and
the same tokens are scored with and without one. Each figure has a standard error over the windows. The table
`windows.csv` has the values of every window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.measure.base import Study
from haq_lab.measure.estimate import estimate
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.pass_result import Level

METRIC: dict[Level, str] = {
    "fp": "perplexity_fp",
    "fp_no_prefix": "perplexity_fp_no_prefix",
    "smoothed": "perplexity_smoothed_fp",
    "quantized": "perplexity",
}
NLL = {level: metric.replace("perplexity", "nll") for level, metric in METRIC.items()}  # columns of windows.csv
TABLE = "windows"


@dataclass(frozen=True)
class Perplexity:
    """Perplexity, KL divergence and token agreement on every dataset of `data`, each with its standard error."""

    evaluates: ClassVar[bool] = True
    deploys: ClassVar[bool] = False

    def __call__(self, study: Study) -> dict[str, float]:
        """Return the metrics. The table `windows` gets a row for each window of each dataset."""
        metrics: dict[str, float] = {}
        tables = []
        for name, windows in study.windows.items():
            study.progress(f"perplexity on {name}")
            documents = study.documents.get(name)
            table, token_kl = score_windows(study.model, windows, study.passed.hidden[name])
            metrics |= summary(table, token_kl, name, documents)
            table.insert(0, "data", name)
            table.insert(2, "document", range(len(table)) if documents is None else documents)
            tables.append(table)
        if tables:
            study.tables[TABLE] = pd.concat(tables, ignore_index=True)
        return metrics


@torch.no_grad()
def score_windows(
    model: LayeredModel, windows: Tensor, hidden: Mapping[Level, Tensor]
) -> tuple[pd.DataFrame, Tensor | None]:
    """Score each window of a dataset from the hidden states after the last layer.

    Args:
        model: The model, for its head.
        windows: Token windows (n, t).
        hidden: Hidden states (n, t, d) by level: `fp`, and with a quantizer `smoothed` and `quantized`, and with a
            prefix `fp_no_prefix`. A checkpoint that was quantised before has `quantized` only.

    Returns:
        A row for each window: its number `window`, the scored `tokens`, the mean negative log-likelihood at each level
        in nats a token (`nll_fp`, `nll_smoothed_fp`, `nll`, `nll_fp_no_prefix`), `kl` (nats a token, original against
        quantised, both with the prefix) and `token_agreement` (share of positions with the same most likely token).
        Without a quantizer, `nll` is that of full precision. Also the KL divergence of each token (n * (t - 1),), or
        None without a quantizer.
    """
    rows, token_kl = [], []
    for number, window in enumerate(windows):
        targets = window[1:]
        tokens = len(targets)
        log_probabilities = {
            level: F.log_softmax(model.head(states[number : number + 1], level == "quantized")[0, :-1].float(), dim=-1)
            for level, states in hidden.items()
            if level != "smoothed" or states is not hidden["fp"]
        }
        if "smoothed" in hidden:  # without smoothing it is the original model
            log_probabilities.setdefault("smoothed", log_probabilities["fp"])
        row: dict[str, float] = {"window": number, "tokens": tokens}
        for level in hidden:
            row[NLL[level]] = float(F.nll_loss(log_probabilities[level], targets, reduction="sum")) / tokens
        if {"fp", "quantized"} <= hidden.keys():
            fp, quantized = log_probabilities["fp"], log_probabilities["quantized"]
            divergence = F.kl_div(quantized, fp, reduction="none", log_target=True).sum(-1)
            token_kl.append(divergence)
            row["kl"] = float(divergence.double().sum()) / tokens
            row["token_agreement"] = float((fp.argmax(-1) == quantized.argmax(-1)).sum()) / tokens
        elif "fp" in hidden:
            row[NLL["quantized"]] = row[NLL["fp"]]
        rows.append(row)
    return pd.DataFrame(rows), torch.cat(token_kl) if token_kl else None


def summary(
    table: pd.DataFrame, token_kl: Tensor | None, dataset: str, documents: Sequence[int] | None = None
) -> dict[str, float]:
    """Summarise the windows of one dataset.

    Args:
        table: The windows of `score_windows`.
        token_kl: KL divergence of each token, or None.
        dataset: Name of the dataset.
        documents: (n,) document of each window, if several windows come from one document.

    Returns:
        `perplexity*.<dataset>`, `kl.<dataset>` and `token_agreement.<dataset>`. With a quantizer also
        `dlnppl.<dataset>`: the logarithm of the quotient of both perplexities, which is the mean of the paired
        differences of the windows. `.stderr` is a standard error. `dlnppl` has its 95 % interval as `.low` and
        `.high`, and `kl` its `.median`, `.p99` and `.max` over the tokens. Errors are left out if all windows come
        from one document.
    """
    means = {level: float(table[column].mean()) for level, column in NLL.items() if column in table}
    metrics = {f"{METRIC[level]}.{dataset}": _exp(mean) for level, mean in means.items()}
    if NLL["quantized"] in table:
        error = estimate(table[NLL["quantized"]], documents).stderr
        metrics[f"perplexity.{dataset}.stderr"] = metrics[f"perplexity.{dataset}"] * error
    if token_kl is not None:
        difference = estimate(table[NLL["quantized"]] - table[NLL["fp"]], documents)
        metrics[f"dlnppl.{dataset}"] = difference.mean
        metrics |= {f"dlnppl.{dataset}.{part}": getattr(difference, part) for part in ("stderr", "low", "high")}
        for name in ("kl", "token_agreement"):
            mean = estimate(table[name], documents)
            metrics |= {f"{name}.{dataset}": mean.mean, f"{name}.{dataset}.stderr": mean.stderr}
        median, p99, largest = np.quantile(token_kl.double().numpy(), [0.5, 0.99, 1])
        metrics |= {f"kl.{dataset}.median": median, f"kl.{dataset}.p99": p99, f"kl.{dataset}.max": largest}
    errors = ("stderr", "low", "high")  # without a second document or with an infinite value there are none
    return {
        name: float(value)
        for name, value in metrics.items()
        if math.isfinite(value) or name.rpartition(".")[2] not in errors
    }


def _exp(value: float) -> float:
    """Return e to the power of `value`, or infinity if a 64-bit float cannot represent it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
