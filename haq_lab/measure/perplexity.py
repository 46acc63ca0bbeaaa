"""Measure perplexity at three points of the pass, and how far quantisation changes the predictions.

Perplexity is per token, as GPTQ and SmoothQuant publish it: exp of the mean negative log-likelihood over all tokens
of a window except its first. The windows do not overlap. A prefix is no part of a window, so it is never scored and
the same tokens are scored with and without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.measure.base import Study
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.pass_result import Level

METRIC: dict[Level, str] = {
    "fp": "perplexity_fp",
    "fp_no_prefix": "perplexity_fp_no_prefix",
    "smoothed": "perplexity_smoothed_fp",
    "quantized": "perplexity",
}


@dataclass(frozen=True)
class Perplexity:
    """Perplexity, KL divergence and token agreement on every dataset of `data`."""

    evaluates: ClassVar[bool] = True
    deploys: ClassVar[bool] = False

    def __call__(self, study: Study) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, windows in study.windows.items():
            study.progress(f"perplexity on {name}")
            metrics |= score(study.model, windows, study.passed.hidden[name], name)
        return metrics


@torch.no_grad()
def score(model: LayeredModel, windows: Tensor, hidden: Mapping[Level, Tensor], dataset: str) -> dict[str, float]:
    """Compute the metrics of one dataset from the hidden states after the last layer.

    Args:
        model: The model, for its head.
        windows: Token windows (n, t).
        hidden: Hidden states (n, t, d) by level: `fp`, and with a quantizer `smoothed` and `quantized`, and with a
            prefix `fp_no_prefix`. A checkpoint that was quantised before has `quantized` only.
        dataset: Name of the dataset.

    Returns:
        `perplexity*.<dataset>`, `kl.<dataset>` (nats a token, original against quantised, both with the prefix) and
        `token_agreement.<dataset>` (share of positions with the same most likely token). Without a quantizer,
        `perplexity.<dataset>` is that of full precision.
    """
    nll: dict[Level, float] = dict.fromkeys(hidden, 0.0)
    divergence = agreement = 0.0
    compared = {"fp", "quantized"} <= hidden.keys()
    for number, window in enumerate(windows):
        targets = window[1:]
        log_probabilities = {
            level: F.log_softmax(model.head(states[number : number + 1], level == "quantized")[0, :-1].float(), dim=-1)
            for level, states in hidden.items()
        }
        for level, values in log_probabilities.items():
            nll[level] += float(F.nll_loss(values, targets, reduction="sum"))
        if compared:
            fp, quantized = log_probabilities["fp"], log_probabilities["quantized"]
            divergence += float(F.kl_div(quantized, fp, reduction="sum", log_target=True))
            agreement += float((fp.argmax(-1) == quantized.argmax(-1)).sum())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    metrics = {f"{METRIC[level]}.{dataset}": _exp(total / tokens) for level, total in nll.items()}
    if compared:
        metrics[f"kl.{dataset}"] = divergence / tokens
        metrics[f"token_agreement.{dataset}"] = agreement / tokens
    elif "fp" in hidden:
        metrics[f"perplexity.{dataset}"] = metrics[f"perplexity_fp.{dataset}"]
    return metrics


def _exp(value: float) -> float:
    """Return e to the power of `value`, or infinity if a 64-bit float cannot represent it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
