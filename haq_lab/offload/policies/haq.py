"""HAQ eviction: evict the expert with the highest expected number of steps until its next hit.

A path model (`path_model.py`) gives p, the probability that the next visit of its layer uses an expert, and h, the
probability of a use at each visit after that. The next visit is d steps (layers) away. The model has L layers.

- Keep the expert until the next visit: p hits in d steps, so d / p steps for a hit.
- Keep the expert until it is used: one hit in d + w steps, with w = L (1 - p) / h.

The smaller of the two is the expert's cost. If the future is known, this is Belady's order: the expert with the nearest
use has the lowest cost.

Layers that the current token has not reached are judged by the path of the latest complete token. Their 1 / p and w
are computed once a token. Layers that it has passed are judged by its own path, so their costs change with each choice.
The recency logits are computed at the start of a token, as if the token used no expert. `gain` is what a use adds to
them. In a prompt, an expert that a share of the tokens uses gets this share of the gain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.policies.eviction import register
from haq_lab.offload.policies.jit import innermost
from haq_lab.offload.policies.path_model import HORIZONS, LEAST_SHARE, MAX_AGE, PathModel, log_odds

F = np.float32
CACHE_LINE = 16  # float32 numbers
LEAST_AVERAGE = F(1e-20)  # keeps averages above the denormal numbers, which are slow
MAX_BITS = 0x7F800000  # more than the bits of any cost; the bits of positive float32 numbers have the same order


class Haq(NamedTuple):
    """State of HAQ eviction, for N = layers * E experts.

    Arrays are float32 and flat unless stated otherwise, because reshaping an array in Numba takes longer than a visit.

    Attributes:
        values: (layers, E) int32, `MAX_BITS` minus the bits of `cost`.
        order: `values`, flat.
        cost: (N,) expected steps until the next hit.
        bits: `cost` as int32.
        average: (horizons * N,) moving averages of use before the current token.
        used: (N,) share of the current tokens that chose an expert.
        last: (N,) int64 token of the last use.
        logits: (2, N) recency logits of p and h.
        gain: (2, N) what a use adds to `logits`.
        known: (2 * N,) path logits from the latest complete token.
        coming: (2 * N,) path logits from the current token.
        tries: (N,) 1 / p.
        wait: (N,) w.
        bias: (2, N) the model's.
        path: (layers, E, 2 * N) the model's; (layers, E, 0) if it has none.
        keep: (horizons,) 1 - 1 / horizon.
        weights: (horizons + 1, 2) the model's weights of the averages' log odds and of log(1 + age).
        age: (MAX_AGE + 1,) log(1 + age).
        row: (N,) layer of each expert.
    """

    values: np.ndarray
    order: np.ndarray
    cost: np.ndarray
    bits: np.ndarray
    average: np.ndarray
    used: np.ndarray
    last: np.ndarray
    logits: np.ndarray
    gain: np.ndarray
    known: np.ndarray
    coming: np.ndarray
    tries: np.ndarray
    wait: np.ndarray
    bias: np.ndarray
    path: np.ndarray
    keep: np.ndarray
    weights: np.ndarray
    age: np.ndarray
    row: np.ndarray


def _zeros(*shape: int) -> NDArray[np.float32]:
    """Return zeros that start at a cache line. Vector loads from another address touch two lines."""
    size = int(np.prod(shape))
    padded = np.zeros(size + CACHE_LINE, F)
    begin = -padded.ctypes.data % (CACHE_LINE * padded.itemsize) // padded.itemsize
    return padded[begin : begin + size].reshape(shape)


def _copied(values: NDArray[Any]) -> NDArray[np.float32]:
    copy = _zeros(*values.shape)
    copy[:] = values
    return copy


def haq_eviction(model: PathModel) -> Haq:
    """Return the state before the first visit.

    The averages are those of the calibration trace. The last use of every expert is at least `MAX_AGE` visits ago.

    Args:
        model: A fitted path model.
    """
    layers, count = model.usage.shape
    total, usage = layers * count, model.usage.ravel()
    bias, weights, age = model.bias.reshape(2, total), model.recency, np.log1p(np.arange(MAX_AGE + 1))
    logits = bias + weights[:, :-1].sum(1, keepdims=True) * log_odds(usage) + weights[:, -1:] * age[MAX_AGE]
    cost, tries, wait = (_zeros(total) for _ in range(3))
    values = _zeros(layers, count).view(np.int32)
    state = Haq(
        values=values,
        order=values.reshape(-1),
        cost=cost,
        bits=cost.view(np.int32),
        average=_copied(np.tile(usage, len(HORIZONS))),
        used=_copied(usage),  # does not change the averages
        last=np.full(total, -MAX_AGE),
        logits=_copied(logits),
        gain=_zeros(2, total),
        known=_zeros(2 * total),
        coming=_zeros(2 * total),
        tries=tries,
        wait=wait,
        bias=_copied(bias),
        path=_copied(model.path.reshape(layers, count, 2 * model.path.shape[-1])),
        keep=_copied(1 - 1 / HORIZONS),
        weights=np.ascontiguousarray(weights.T, F),
        age=age.astype(F),
        row=_copied(np.repeat(np.arange(layers), count)),
    )
    _update_all(state)
    return state


@innermost
def _begin(state):
    state.known[:] = 0
    state.coming[:] = 0
    _update_all(state)


@innermost
def _touch(state, layer, wanted, counts, tokens, now):
    layers, count = state.values.shape
    if layer == 0:
        _start_token(state, now)
        state.coming[:] = 0
        state.used[:] = 0
    for expert in wanted:
        at, share = layer * count + expert, F(counts[expert] / tokens)
        state.used[at], state.last[at] = share, now
        state.logits[0, at] += share * state.gain[0, at]
        state.logits[1, at] += share * state.gain[1, at]
    _add_paths(state.coming, state.path[layer], wanted, counts, tokens)
    if layer == layers - 1:
        known, coming = state.known, state.coming
        for index in range(len(known)):
            known[index] = coming[index]
        _update_all(state)


@innermost
def _add_paths(coming, path, wanted, counts, tokens):
    """Add the path logits of the wanted experts, two rows at a time, because most memory traffic is here."""
    for index in range(0, len(wanted) - 1, 2):
        first, second = wanted[index], wanted[index + 1]
        share, second_share = F(counts[first] / tokens), F(counts[second] / tokens)
        row, second_row = path[first], path[second]
        for at in range(len(row)):
            coming[at] += share * row[at] + second_share * second_row[at]
    if len(wanted) % 2:
        last = wanted[len(wanted) - 1]
        share, row = F(counts[last] / tokens), path[last]
        for at in range(len(row)):
            coming[at] += share * row[at]


@innermost
def _start_token(state, now):
    """Add the previous token to the averages, and compute the logits as if token `now` used no expert."""
    total, horizons = len(state.order), len(state.keep)
    used, last, newest = state.used, state.last, state.age[1]
    next_use, hazard, next_gain, hazard_gain = state.logits[0], state.logits[1], state.gain[0], state.gain[1]
    next_bias, hazard_bias = state.bias[0], state.bias[1]
    next_weight, hazard_weight = state.weights[horizons, 0], state.weights[horizons, 1]
    for index in range(len(last)):
        age = state.age[min(now + 1 - last[index], MAX_AGE)]
        next_use[index] = next_bias[index] + next_weight * age
        hazard[index] = hazard_bias[index] + hazard_weight * age
        next_gain[index] = next_weight * (newest - age)
        hazard_gain[index] = hazard_weight * (newest - age)
    for horizon in range(horizons):
        average = state.average[horizon * total : (horizon + 1) * total]
        keep, take = state.keep[horizon], F(1) - state.keep[horizon]
        next_weight, hazard_weight = state.weights[horizon, 0], state.weights[horizon, 1]
        for index in range(len(average)):
            average[index] = average[index] * keep + LEAST_AVERAGE + used[index] * take
            unused = average[index] * keep
            odds = _log_odds(unused)
            more = _log_odds(unused + take) - odds
            next_use[index] += next_weight * odds
            hazard[index] += hazard_weight * odds
            next_gain[index] += next_weight * more
            hazard_gain[index] += hazard_weight * more


@innermost
def _update_all(state):
    """Compute 1 / p and w of all experts from the path of the latest complete token."""
    tries, wait, sweep, total = state.tries, state.wait, F(len(state.values)), len(state.order)
    next_use, hazard = state.logits[0], state.logits[1]
    next_path, hazard_path = state.known[:total], state.known[total:]
    for index in range(len(tries)):
        against = _exp_minus(next_use[index] + next_path[index])  # odds against a use: p = 1 / (1 + against)
        later = _exp_minus(hazard[index] + hazard_path[index])
        tries[index] = F(1) + against
        wait[index] = sweep * against * (F(1) + later) / (F(1) + against)


@innermost
def _refresh(state, layer):
    layers, total, sweep = len(state.values), len(state.order), F(len(state.values))
    # Layers passed: by the path of the current token. Slices start at 0, because Numba vectorises no other loops.
    passed = (layer + 1) * state.values.shape[1]
    cost, row = state.cost[:passed], state.row[:passed]
    next_use, hazard = state.logits[0], state.logits[1]
    next_path, hazard_path = state.coming[:total], state.coming[total:]
    ahead = F(layers - layer)
    for index in range(len(cost)):
        against = _exp_minus(next_use[index] + next_path[index])
        later = _exp_minus(hazard[index] + hazard_path[index])
        tries, distance = F(1) + against, row[index] + ahead
        cost[index] = min(distance * tries, distance + sweep * against * (F(1) + later) / tries)
    # Layers to come: by the path of the latest complete token.
    cost, row = state.cost[passed:], state.row[passed:]
    tries_to_come, wait = state.tries[passed:], state.wait[passed:]
    for index in range(len(cost)):
        distance = row[index] - F(layer)
        cost[index] = min(distance * tries_to_come[index], distance + wait[index])
    values, bits = state.order, state.bits
    for index in range(len(values)):
        values[index] = MAX_BITS - bits[index]


@innermost
def _exp_minus(z):
    """Return exp(-z), limited to exp(-10) and exp(10), with an error of 0.1 %.

    It is a polynomial for exp(-z / 16) that is squared four times. Numba does not inline exp().
    """
    z = min(max(z, F(-10)), F(10))
    root = F(0.9999756) - z * (F(0.06247724) - z * (F(1.9549032e-3) - z * (F(4.1661e-5) - z * F(6.255097e-7))))
    root *= root
    root *= root
    root *= root
    return root * root


@innermost
def _log_odds(share):
    """Return `path_model.log_odds` with an error of 4e-6. It is 2 atanh(x) as a rational function."""
    x = (share - F(0.5)) * F(2 / (1 + 2 * LEAST_SHARE))
    s = x * x
    numerator = F(2.00003534) + s * (F(-3.54842942) + s * (F(1.75630286) + s * F(-0.18012021)))
    denominator = F(1) + s * (F(-2.10722965) + s * (F(1.37884339) + s * F(-0.26729633)))
    return x * numerator / denominator


register(Haq, _touch, _begin, _refresh)
