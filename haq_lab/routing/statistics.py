"""Compute statistics of expert activation paths (arXiv 2508.07329, section on paths).

The path of a token is the sequence of expert sets that it visits, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haq_lab.routing.trace import Trace

Residency = NDArray[np.bool_]  # (layers, E): whether an expert is in the fast tier


def frequencies(trace: Trace) -> NDArray[np.float64]:
    """Return the share of tokens that choose each expert, (layers, E). Each row sums to k."""
    counts = [
        np.bincount(trace.experts[:, layer].ravel(), minlength=trace.expert_count) for layer in range(trace.layers)
    ]
    return np.stack(counts) / trace.tokens


def transitions(trace: Trace, distance: int = 1) -> NDArray[np.int64]:
    """Count tokens that choose expert i at a layer and j `distance` layers later, (layers - distance, E, E)."""
    count = trace.expert_count
    table = np.zeros((trace.layers - distance, count * count), np.int64)
    for layer in range(trace.layers - distance):
        here = trace.experts[:, layer, :, None].astype(np.int64)
        later = trace.experts[:, layer + distance, None, :]
        table[layer] = np.bincount((here * count + later).ravel(), minlength=count * count)
    return table.reshape(-1, count, count)


def hits(trace: Trace, resident: Residency) -> NDArray[np.bool_]:
    """Return whether the expert of each choice is resident, (tokens, layers, k)."""
    layer = np.arange(trace.layers)[None, :, None]
    return resident[layer, trace.experts]


def coverage(trace: Trace, resident: Residency, span: int) -> float:
    """Return how often all experts of a token in `span` consecutive layers are resident, as a share."""
    whole = hits(trace, resident).all(-1)  # (tokens, layers)
    windows = np.lib.stride_tricks.sliding_window_view(whole, span, axis=1)
    return float(windows.all(-1).mean())


def entropy(trace: Trace) -> NDArray[np.float64]:
    """Return the entropy of the experts' shares in bits, (layers,). It is log2(E) if all are equally frequent."""
    share = frequencies(trace) / trace.k
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)


def repeat_rate(trace: Trace) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how often the previous token's first choice is the first, and any, choice again: twice (layers,)."""
    before, after = _neighbours(trace, 1)
    again = trace.experts[before, :, :1] == trace.experts[after]  # (pairs, layers, k)
    return again[..., 0].mean(0), again.any(-1).mean(0)


def jaccard(trace: Trace, distances: Sequence[int]) -> NDArray[np.float64]:
    """Return the mean Jaccard overlap of the expert sets of two tokens of a sequence, (distances, layers).

    Args:
        trace: The trace.
        distances: Distances between the two tokens. The result is NaN if no sequence is long enough.
    """
    rows = []
    for distance in distances:
        before, after = _neighbours(trace, distance)
        if len(before) == 0:
            rows.append(np.full(trace.layers, np.nan))
            continue
        same = trace.experts[before][..., :, None] == trace.experts[after][..., None, :]
        shared = same.any(-1).sum(-1)
        rows.append((shared / (2 * trace.k - shared)).mean(0))
    return np.stack(rows)


def _neighbours(trace: Trace, distance: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return token indices (before, after) that are `distance` apart within a sequence."""
    sequence = np.repeat(np.arange(len(trace.starts)), trace.ends() - trace.starts)
    before = np.arange(trace.tokens - distance) if distance < trace.tokens else np.zeros(0, np.int64)
    before = before[sequence[before] == sequence[before + distance]]
    return before, before + distance


@dataclass(frozen=True)
class Drift:
    """Difference between the routing of a profile text and a test text.

    Attributes:
        distance: (layers,) total variation between the experts' shares, 0 to 1.
        correlation: (layers,) correlation of the shares. NaN if one of them is constant.
    """

    distance: NDArray[np.float64]
    correlation: NDArray[np.float64]


def drift(profile: Trace, test: Trace) -> Drift:
    """Return total variation and correlation of the expert shares of each layer."""
    one, other = frequencies(profile) / profile.k, frequencies(test) / test.k
    centred = [shares - shares.mean(-1, keepdims=True) for shares in (one, other)]
    with np.errstate(invalid="ignore", divide="ignore"):
        norm = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
        correlation = (centred[0] * centred[1]).sum(-1) / norm
    return Drift(np.abs(one - other).sum(-1) / 2, correlation)
