"""Predict from a token's path when each expert is used next: a logistic model that is fitted on a calibration trace.

For every expert the model predicts the probability that its layer's next visit uses it. The features are

- recency: moving averages of its use over 2 to 1,024 visits, and the number of visits since its last use;
- the path: the experts that the latest token chose, at all layers, weighted by a matrix (layers * E, layers * E). Paths
  identify a kind of token, because the upper layers already prepare the next token.

From the same features it predicts the hazard: the probability of a use at each visit after the next one. The hazard is
constant, so the waiting time is geometric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from haq_lab.offload.policies.jit import compiled
from haq_lab.routing.statistics import frequencies
from haq_lab.routing.trace import Trace

HORIZONS = np.array([2, 16, 128, 1024], np.float32)  # visits; more horizons do not help (experiments/offload_policy.md)
LEAST_SHARE = 0.03  # added to a share and to its complement, so that the log odds are finite
MAX_AGE = 256  # visits; longer waits and ages count as this
STEPS, BATCH = 1600, 256
SHARED_RATE, EXPERT_RATE, PATH_RATE = 0.02, 0.01, 0.003  # learning rates: shared weights, bias per expert, path matrix
HAZARD_WEIGHT = 0.2  # weight of the waits beyond the next visit in the loss
MAX_FEATURES = 100_000_000  # numbers; longer traces are cut
MAX_PATH_EXPERTS = 2_000  # of all layers together; the path matrix grows with the square


@dataclass(frozen=True)
class PathModel:
    """The weights of a fitted path model, in float32.

    Attributes:
        usage: (layers, E) share of tokens that choose an expert. The moving averages start from it.
        recency: (2, horizons + 1) weights of the averages' log odds and of log(1 + age). Row 0 is for the next visit,
            row 1 for the hazard after it.
        bias: (2, layers, E) bias of each expert.
        path: (layers * E, 2, layers * E). Row i is what the choice of expert i adds to both logits of all experts. The
            rows of a layer are centred, so a layer whose choice is unknown adds nothing. The last axis is empty if the
            model has more than `MAX_PATH_EXPERTS` experts.
    """

    usage: NDArray[np.float32]
    recency: NDArray[np.float32]
    bias: NDArray[np.float32]
    path: NDArray[np.float32]


def path_limitation(layers: int, experts: int) -> str | None:
    """Return a sentence if a path model leaves out the path for a model of this size, else None.

    Args:
        layers: Number of layers of the model.
        experts: Number of experts in a layer.
    """
    if (total := layers * experts) <= MAX_PATH_EXPERTS:
        return None
    return (
        f"HAQ eviction ignores the path of a token, because the model has {total:,} experts and the path model "
        f"supports {MAX_PATH_EXPERTS:,}. It uses recency only."
    )


def fit_path_model(
    trace: Trace, seed: int = 0, steps: int = STEPS, progress: Callable[[int, int], None] | None = None
) -> PathModel:
    """Fit a path model on a calibration trace. 32,000 tokens of 240 experts take about a minute on one core.

    Args:
        trace: The calibration trace. At most `MAX_FEATURES` features of its first tokens are used.
        seed: Seed of the batches.
        steps: Number of optimiser steps.
        progress: Called after each step with the number of finished steps and of all steps.

    Returns:
        The fitted model. Its path is empty if `path_limitation` says so.
    """
    total = trace.layers * trace.expert_count
    tokens = MAX_FEATURES // (total * (len(HORIZONS) + 1))
    experts = np.ascontiguousarray(trace.experts[:tokens])
    usage = frequencies(trace).astype(np.float32)
    with_path = path_limitation(trace.layers, trace.expert_count) is None
    fit = _Fit(experts, usage, np.random.default_rng(seed), with_path)
    fit.run(steps, progress)
    return fit.model()


class _Fit:
    """Fits a path model with AdamW on both likelihoods.

    A step uses random tokens. For each of them the path is known up to a random layer, as in decoding.
    """

    def __init__(self, experts: NDArray[Any], usage: NDArray[np.float32], rng: np.random.Generator, with_path: bool):
        self.usage, self.rng, self.with_path = usage, rng, with_path
        layers, count = usage.shape
        self.features = torch.from_numpy(_features(experts, usage, HORIZONS))  # (tokens, layers, E, horizons + 1)
        self.waits = torch.from_numpy(_waits(experts, count))  # (tokens, layers, E)
        chosen = np.zeros((len(experts), layers, count), np.float32)
        np.put_along_axis(chosen, experts.astype(np.int64), 1.0, -1)
        self.mean = torch.from_numpy(chosen.mean(0).ravel())
        self.chosen = torch.from_numpy(chosen.reshape(len(experts), -1))
        sample = self.features[:: max(1, len(experts) // 4096)]
        self.centre, self.scale = sample.mean((0, 1, 2)), sample.std((0, 1, 2)) + 1e-6
        self.recency = nn.Parameter(torch.zeros(2, self.features.shape[-1]))
        self.bias = nn.Parameter(torch.zeros(2, 1, 1))
        self.expert_bias = nn.Parameter(torch.zeros(2, layers, count))
        self.path = nn.Parameter(torch.zeros(layers * count, 2 * layers * count if with_path else 0))

    def run(self, steps: int, progress: Callable[[int, int], None] | None) -> None:
        groups: list[dict[str, Any]] = [
            {"params": [self.recency, self.bias], "weight_decay": 0.0, "lr": SHARED_RATE},
            {"params": [self.expert_bias], "weight_decay": 0.0, "lr": EXPERT_RATE},
        ]
        if self.with_path:
            groups.append({"params": [self.path], "weight_decay": 0.05, "lr": PATH_RATE})
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], steps)
        first = min(int(HORIZONS[-1]), len(self.chosen) // 2)  # earlier averages have not settled
        for step in range(steps):
            rows = torch.from_numpy(self.rng.integers(max(first, 1), len(self.chosen), BATCH))
            with torch.enable_grad():
                loss = self._loss(rows)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps)

    def _loss(self, rows: Tensor) -> Tensor:
        features = (self.features[rows] - self.centre) / self.scale
        logits = torch.einsum("nlef,hf->hnle", features, self.recency) + (self.bias + self.expert_bias)[:, None]
        if self.with_path:
            logits = logits + self._path_logits(rows)
        waits = self.waits[rows].float()
        next_visit = binary_cross_entropy_with_logits(logits[0], (waits == 1).float())
        # The wait beyond the next visit is geometric. It is censored if the end was not observed.
        later, ended = (waits > 1).float(), (waits < MAX_AGE).float()
        likelihood = later * (ended * logsigmoid(logits[1]) + (waits - 2) * logsigmoid(-logits[1]))
        return next_visit - HAZARD_WEIGHT * likelihood.mean()

    def _path_logits(self, rows: Tensor) -> Tensor:
        """Return what the previous token's path adds to both logits, (2, n, layers, E).

        While a token is decoded, its path is known up to the current layer. So the experts of the layers up to there
        get the path up to there, and the experts of later layers get the whole path.
        """
        layers, count = self.usage.shape
        path = self.chosen[rows - 1] - self.mean
        current = torch.from_numpy(self.rng.integers(0, layers, (len(rows), 1)))
        layer = torch.arange(layers)[None]
        known = torch.where(layer.repeat_interleave(count, 1) <= current, path, 0.0)
        partial, whole = ((part @ self.path).view(-1, 2, layers, count) for part in (known, path))
        return torch.where((layer <= current)[:, None, :, None], partial, whole).transpose(0, 1)

    def model(self) -> PathModel:
        layers, count = self.usage.shape
        with torch.no_grad():
            recency = self.recency / self.scale
            bias = self.bias + self.expert_bias - (recency @ self.centre)[:, None, None]
            by_layer = self.path.unflatten(0, (layers, count))
            mean = self.mean.view(layers, count)
            average = torch.einsum("le,leo->lo", mean, by_layer) / mean.sum(-1)[:, None]
            path = (by_layer - average[:, None]).reshape(layers * count, 2, self.path.shape[1] // 2)
        return PathModel(self.usage, *(each.numpy().astype(np.float32) for each in (recency, bias, path)))


@compiled
def log_odds(share):
    """Return the log odds of a share. They are finite for 0 and 1."""
    return np.log((share + LEAST_SHARE) / (1 - share + LEAST_SHARE))


@compiled
def _features(experts, usage, horizons):
    """Return the recency features before each token, (tokens, layers, E, horizons + 1)."""
    tokens, layers, k = experts.shape
    count, size = usage.shape[1], len(horizons)
    features = np.empty((tokens, layers, count, size + 1), np.float32)
    average = np.empty((layers, count, size), np.float32)
    last = np.full((layers, count), -MAX_AGE)
    for index in range(size):
        average[:, :, index] = usage
    for token in range(tokens):
        for layer in range(layers):
            for expert in range(count):
                for index in range(size):
                    features[token, layer, expert, index] = log_odds(average[layer, expert, index])
                    average[layer, expert, index] -= average[layer, expert, index] / horizons[index]
                features[token, layer, expert, size] = np.log(1.0 + min(token - last[layer, expert], MAX_AGE))
            for choice in range(k):
                expert = experts[token, layer, choice]
                last[layer, expert] = token
                for index in range(size):
                    average[layer, expert, index] += 1 / horizons[index]
    return features


@compiled
def _waits(experts, count):
    """Return the visits until each expert is used, (tokens, layers, E) int16: 1 if the token itself uses it."""
    tokens, layers, k = experts.shape
    waits = np.empty((tokens, layers, count), np.int16)
    wait = np.full((layers, count), MAX_AGE, np.int16)
    for token in range(tokens - 1, -1, -1):
        for layer in range(layers):
            for expert in range(count):
                wait[layer, expert] = min(wait[layer, expert] + 1, MAX_AGE)
            for choice in range(k):
                wait[layer, experts[token, layer, choice]] = 1
        waits[token] = wait
    return waits
