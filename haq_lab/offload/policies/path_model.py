"""What a token's path says about the next token: a logistic model of expert use, fitted on a calibration trace.

For every expert it gives the probability of use at its layer's next visit, from

- how often it was used lately: moving averages over 2 to 1,024 visits, and the visits since its last use;
- the path: which experts the latest token chose, at all layers. A matrix (layers * E, layers * E); it is what tells
  tokens apart, since the upper layers already prepare the next token.

and from the same the hazard per visit after that one, fitted as a geometric wait.
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

HORIZONS = np.array([2, 16, 128, 1024], np.float32)  # visits; more of them gave no more (experiments/offload_policy.md)
LEAST_SHARE = 0.03  # added to a moving average and to its complement before their logarithms
FORGOTTEN = 256  # visits: waits and ages longer than that count as this
STEPS, BATCH = 1600, 256
RATE, RATE_OWN, RATE_PATH = 0.02, 0.01, 0.003  # of learning: what all experts share, each one's own, the path
SHARE_LATER = 0.2  # of the waits beyond the next visit in the loss
MOST_NUMBERS = 100_000_000  # in the features of the calibration tokens that are used
MOST_PATH_NUMBERS = 4_000_000  # in the path matrix; larger models go without one


@dataclass(frozen=True)
class PathModel:
    """The fitted numbers, float32.

    Attributes:
        usage: (layers, E) share of tokens that choose an expert: the moving averages' start.
        recency: (2, horizons + 1) weights of the averages' log odds and of log(1 + age); row 0 for the next
            visit, row 1 for the hazard after it.
        bias: (2, layers, E).
        path: (layers * E, 2, layers * E): what a choice (row) adds to both logits. Centred, so that a layer whose
            choice is not known adds nothing.
    """

    usage: NDArray[np.float32]
    recency: NDArray[np.float32]
    bias: NDArray[np.float32]
    path: NDArray[np.float32]


def fit_path_model(
    trace: Trace, seed: int = 0, steps: int = STEPS, progress: Callable[[int, int], None] | None = None
) -> PathModel:
    """Fit on a calibration trace; about a minute on one core for 32,000 tokens of 240 experts.

    Args:
        progress: Called with (steps done, steps).
    """
    layers, count = trace.layers, trace.expert_count
    size = layers * count
    most = MOST_NUMBERS // (size * (len(HORIZONS) + 1))
    experts = np.ascontiguousarray(trace.experts[:most])
    usage = frequencies(trace).astype(np.float32)
    fit = _Fit(experts, usage, np.random.default_rng(seed), with_path=size * size <= MOST_PATH_NUMBERS)
    fit.run(steps, progress)
    return fit.model()


class _Fit:
    """Adam on the two likelihoods; a step sees some tokens, each with its sweep over the layers cut at random."""

    def __init__(
        self, experts: NDArray[np.uint8], usage: NDArray[np.float32], rng: np.random.Generator, with_path: bool
    ):
        self.usage, self.rng = usage, rng
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
        self.own = nn.Parameter(torch.zeros(2, layers, count))
        self.path = nn.Parameter(torch.zeros(layers * count, 2 * layers * count), requires_grad=with_path)

    def run(self, steps: int, progress: Callable[[int, int], None] | None) -> None:
        groups: list[dict[str, Any]] = [{"params": [self.recency, self.bias], "weight_decay": 0.0, "lr": RATE}]
        groups += [{"params": [self.own], "weight_decay": 0.0, "lr": RATE_OWN}]
        groups += [{"params": [self.path], "weight_decay": 0.05, "lr": RATE_PATH}] if self.path.requires_grad else []
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], steps)
        first = min(int(HORIZONS[-1]), len(self.chosen) // 2)  # the averages have settled
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
        layers, count = self.usage.shape
        features = (self.features[rows] - self.centre) / self.scale
        logits = torch.einsum("nlef,hf->hnle", features, self.recency) + (self.bias + self.own)[:, None]
        before = self.chosen[rows - 1] - self.mean
        if self.path.requires_grad:
            # In decode the path is known up to the layer at work: experts of layers passed are judged by that much.
            cut = torch.from_numpy(self.rng.integers(0, layers, (len(rows), 1)))
            layer = torch.arange(layers)[None]
            known = torch.where(layer.repeat_interleave(count, 1) <= cut, before, 0.0)
            partial, whole = ((part @ self.path).view(-1, 2, layers, count) for part in (known, before))
            logits = logits + torch.where((layer <= cut)[:, None, :, None], partial, whole).transpose(0, 1)
        waits = self.waits[rows].float()
        at_once = binary_cross_entropy_with_logits(logits[0], (waits == 1).float())
        # Geometric: the wait beyond the next visit ends with the hazard, and is censored where it was not seen to end.
        later, ended = (waits > 1).float(), (waits < FORGOTTEN).float()
        likelihood = later * (ended * logsigmoid(logits[1]) + (waits - 2) * logsigmoid(-logits[1]))
        return at_once - SHARE_LATER * likelihood.mean()

    def model(self) -> PathModel:
        layers, count = self.usage.shape
        with torch.no_grad():
            recency = self.recency / self.scale
            bias = self.bias + self.own - (recency @ self.centre)[:, None, None]
            by_layer = self.path.view(layers, count, -1)
            k = self.mean.view(layers, count).sum(-1)[:, None]
            average = torch.einsum("le,leo->lo", self.mean.view(layers, count), by_layer) / k
            path = (by_layer - average[:, None]).reshape(layers * count, 2, layers * count)
        return PathModel(self.usage, *(each.numpy().astype(np.float32) for each in (recency, bias, path)))


@compiled
def log_odds(share):
    """Of a share, kept finite."""
    return np.log((share + LEAST_SHARE) / (1 - share + LEAST_SHARE))


@compiled
def _features(experts, usage, horizons):
    """(tokens, layers, E, horizons + 1): the recency features as they stand before each token."""
    tokens, layers, k = experts.shape
    count, size = usage.shape[1], len(horizons)
    features = np.empty((tokens, layers, count, size + 1), np.float32)
    average = np.empty((layers, count, size), np.float32)
    last = np.full((layers, count), -FORGOTTEN)
    for index in range(size):
        average[:, :, index] = usage
    for token in range(tokens):
        for layer in range(layers):
            for expert in range(count):
                for index in range(size):
                    features[token, layer, expert, index] = log_odds(average[layer, expert, index])
                    average[layer, expert, index] -= average[layer, expert, index] / horizons[index]
                features[token, layer, expert, size] = np.log(1.0 + min(token - last[layer, expert], FORGOTTEN))
            for choice in range(k):
                expert = experts[token, layer, choice]
                last[layer, expert] = token
                for index in range(size):
                    average[layer, expert, index] += 1 / horizons[index]
    return features


@compiled
def _waits(experts, count):
    """(tokens, layers, E) int16: visits until an expert is used, 1 where the token itself uses it."""
    tokens, layers, k = experts.shape
    waits = np.empty((tokens, layers, count), np.int16)
    wait = np.full((layers, count), FORGOTTEN, np.int16)
    for token in range(tokens - 1, -1, -1):
        for layer in range(layers):
            for expert in range(count):
                wait[layer, expert] = min(wait[layer, expert] + 1, FORGOTTEN)
            for choice in range(k):
                wait[layer, experts[token, layer, choice]] = 1
        waits[token] = wait
    return waits
