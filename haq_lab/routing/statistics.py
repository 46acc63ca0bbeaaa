"""Statistics of expert activation paths: what routing repeats, and how far (arXiv 2508.07329, section on paths).

A token's path is the sequence of expert sets that it visits, layer after layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haq_lab.routing.trace import Trace

Residency = NDArray[np.bool_]  # (layers, E): which experts are in the fast tier


def frequencies(trace: Trace) -> NDArray[np.float64]:
    """(layers, E): the share of tokens that choose an expert; each layer sums to k."""
    counts = [
        np.bincount(trace.experts[:, layer].ravel(), minlength=trace.expert_count) for layer in range(trace.layers)
    ]
    return np.stack(counts) / trace.tokens


def transitions(trace: Trace, distance: int = 1) -> NDArray[np.int64]:
    """(layers - distance, E, E): how many tokens choose expert i at a layer and expert j `distance` layers later."""
    count = trace.expert_count
    table = np.zeros((trace.layers - distance, count * count), np.int64)
    for layer in range(trace.layers - distance):
        here = trace.experts[:, layer, :, None].astype(np.int64)
        later = trace.experts[:, layer + distance, None, :]
        table[layer] = np.bincount((here * count + later).ravel(), minlength=count * count)
    return table.reshape(-1, count, count)


def hits(trace: Trace, resident: Residency) -> NDArray[np.bool_]:
    """(tokens, layers, k): which choices find their expert among `resident`."""
    layer = np.arange(trace.layers)[None, :, None]
    return resident[layer, trace.experts]


def coverage(trace: Trace, resident: Residency, span: int) -> float:
    """The share of (token, `span` neighbouring layers) all of whose experts are resident."""
    whole = hits(trace, resident).all(-1)  # (tokens, layers)
    windows = np.lib.stride_tricks.sliding_window_view(whole, span, axis=1)
    return float(windows.all(-1).mean())


def entropy(trace: Trace) -> NDArray[np.float64]:
    """(layers,) bits of the experts' shares; log2(E) where all are equally frequent."""
    share = frequencies(trace) / trace.k
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)


def repeat_rate(trace: Trace) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(layers,) twice: how often the previous token's first choice is the first choice again, and any choice again."""
    before, after = _neighbours(trace, 1)
    again = trace.experts[before, :, :1] == trace.experts[after]  # (pairs, layers, k)
    return again[..., 0].mean(0), again.any(-1).mean(0)


def jaccard(trace: Trace, distances: Sequence[int]) -> NDArray[np.float64]:
    """(distances, layers): mean overlap (Jaccard) of the expert sets of tokens so far apart in one sequence.

    NaN where no sequence is long enough.
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
    """Token indices (before, after) `distance` apart within a sequence."""
    sequence = np.repeat(np.arange(len(trace.starts)), trace.ends() - trace.starts)
    before = np.arange(trace.tokens - distance) if distance < trace.tokens else np.zeros(0, np.int64)
    before = before[sequence[before] == sequence[before + distance]]
    return before, before + distance


@dataclass(frozen=True)
class Drift:
    """How far a profile text's routing is from a test text's.

    Attributes:
        distance: (layers,) total variation between the experts' shares, 0 to 1.
        correlation: (layers,) of the shares, NaN where one is constant.
    """

    distance: NDArray[np.float64]
    correlation: NDArray[np.float64]


def drift(profile: Trace, test: Trace) -> Drift:
    """Total variation and correlation of expert shares, a layer each."""
    one, other = frequencies(profile) / profile.k, frequencies(test) / test.k
    centred = [shares - shares.mean(-1, keepdims=True) for shares in (one, other)]
    with np.errstate(invalid="ignore", divide="ignore"):
        norm = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
        correlation = (centred[0] * centred[1]).sum(-1) / norm
    return Drift(np.abs(one - other).sum(-1) / 2, correlation)
