"""The `haq` rule: the resident expert leaves that promises fewest hits for the time it holds its slot.

A path model (`path_model.py`) says how probably an expert is used at its layer's next visit, p, and at each one
after that, h. The next visit is d layers away, a sweep over the model is L layers. Keeping the expert until then
earns p hits in d steps; keeping it until it is used earns one in d + L (1 - p) / h. The better of the two rates is
its value: with a known future that is Belady's order, nearest use first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from haq_lab.offload.cache import teach
from haq_lab.offload.compiled import compiled
from haq_lab.offload.path_model import FORGOTTEN, HORIZONS, PathModel, log_odds


class ExpectedWait(NamedTuple):
    """`values` (layers, E), and what it is computed from, float32.

    average: (layers, E, horizons) moving averages of use; last: (layers, E) token of the last use.
    logits: (2, layers, E) of use at the next visit and of the hazard after it, path aside.
    known: (2, layers, E) path terms from the latest whole token; coming: from the token at work.
    """

    values: np.ndarray
    average: np.ndarray
    last: np.ndarray
    logits: np.ndarray
    known: np.ndarray
    coming: np.ndarray
    recency: np.ndarray
    bias: np.ndarray
    path: np.ndarray
    horizons: np.ndarray


def expected_wait(model: PathModel) -> ExpectedWait:
    """The rule before anything was used."""
    shape = model.usage.shape
    average = np.repeat(model.usage[:, :, None], len(HORIZONS), 2).astype(np.float32)
    last = np.full(shape, -FORGOTTEN)
    logits, known, coming = (np.zeros((2, *shape), np.float32) for _ in range(3))
    path = np.ascontiguousarray(model.path).reshape(*shape, 2, *shape)
    fitted = model.recency, model.bias, path, HORIZONS.copy()
    state = ExpectedWait(np.zeros(shape, np.float32), average, last, logits, known, coming, *fitted)
    for layer in range(shape[0]):
        _judge(state, layer, 0)
    return state


@compiled
def _judge(state, layer, now):
    """The layer's logits from what was used lately."""
    size = len(state.horizons)
    for expert in range(state.values.shape[1]):
        next_use, hazard = state.bias[0, layer, expert], state.bias[1, layer, expert]
        for index in range(size):
            feature = log_odds(state.average[layer, expert, index])
            next_use += state.recency[0, index] * feature
            hazard += state.recency[1, index] * feature
        age = np.log(np.float32(1.0 + min(now + 1 - state.last[layer, expert], FORGOTTEN)))
        state.logits[0, layer, expert] = next_use + state.recency[0, size] * age
        state.logits[1, layer, expert] = hazard + state.recency[1, size] * age


@compiled
def _begin(state):
    state.known[:] = 0
    state.coming[:] = 0


@compiled
def _touch(state, layer, counts, tokens, now):
    layers, count = state.values.shape
    if layer == 0:
        state.coming[:] = 0
    for expert in range(count):
        share = np.float32(counts[expert] / tokens)
        for index in range(len(state.horizons)):
            average = state.average[layer, expert, index]
            state.average[layer, expert, index] += (share - average) / state.horizons[index]
        if counts[expert] > 0:
            state.last[layer, expert] = now
            coming, row = state.coming.reshape(-1), state.path[layer, expert].reshape(-1)
            for index in range(len(coming)):
                coming[index] += share * row[index]
    _judge(state, layer, now)
    if layer == layers - 1:
        state.known[:] = state.coming


@compiled
def _refresh(state, layer):
    layers, count = state.values.shape
    passed = (layer + 1) * count
    _judge_span(state, state.coming, 0, passed, layers - layer)
    _judge_span(state, state.known, passed, layers * count, -layer)


@compiled
def _judge_span(state, path, begin, end, ahead):
    """Values of experts `begin` to `end` (layer * E + expert), whose next visit is `ahead` + their layer away."""
    layers, count = state.values.shape
    size, one = layers * count, np.float32(1)
    values, logits, known = state.values.reshape(-1), state.logits.reshape(-1), path.reshape(-1)
    sweep = np.float32(layers)
    for index in range(begin, end):
        use = _sigmoid(logits[index] + known[index])
        hazard = _sigmoid(logits[size + index] + known[size + index])
        distance = np.float32(index // count + ahead)
        until_used = distance + sweep * (one - use) / hazard
        values[index] = max(use / distance, one / until_used)


@compiled
def _sigmoid(z):
    """The logistic function by a rational tanh, right to 1e-4: this is the innermost loop, and exp() is not inlined."""
    x = min(max(z * np.float32(0.5), np.float32(-4.9)), np.float32(4.9))
    s = x * x
    above = x * (np.float32(135135) + s * (np.float32(17325) + s * (np.float32(378) + s)))
    below = np.float32(135135) + s * (np.float32(62370) + s * (np.float32(3150) + s * np.float32(28)))
    return np.float32(0.5) + np.float32(0.5) * above / below


teach(ExpectedWait, _begin, _touch, _refresh)
