"""The `haq` rule: the resident expert leaves that holds its slot longest for a hit.

A path model (`path_model.py`) says how probably an expert is used at its layer's next visit, p, and at each one
after that, h. The next visit is d layers away, a sweep over the model is L layers. Keeping the expert until then
earns p hits in d steps, a hit in d / p; keeping it until it is used earns one in d + w, w = L (1 - p) / h. The shorter
of the two is its cost: with a known future that is Belady's order, nearest use first.

Layers that are still to come in this token are judged by the latest whole token's path, so their p and w stand until
they are visited and are worked out once a token; those of layers passed change with every choice. What was used lately
is looked at as a token begins, for all experts: what their logits will be if it does not use them, and what using them
would add. (A prompt that gives an expert a share of its tokens adds that share of it.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.policies.eviction import register
from haq_lab.offload.policies.jit import innermost
from haq_lab.offload.policies.path_model import FORGOTTEN, HORIZONS, LEAST_SHARE, PathModel, log_odds

F = np.float32
LINE = 16  # numbers
LEAST_AVERAGE = F(1e-20)  # what fades below what a float32 holds in full is slow to compute with
MOST = 0x7F800000  # more than the bits of any cost; those of a positive float32 are ordered as it is


class Haq(NamedTuple):
    """`values` (layers, E) is `MOST` minus the bits of `cost` (N,), N = layers * E, which follows from the rest.

    Float32, and flat, as numba takes longer to reshape an array than to go through it; `order` is `values` flat.

    average: (horizons * N,) moving averages of use, before the token at work.
    used: (N,) share of the tokens at work that chose an expert; last: (N,) int64 token of the last use.
    logits: (2, N) of use at the next visit and of the hazard after it, path aside; gain: what a use adds to them.
    known, coming: (2 * N,) path terms from the latest whole token, and from the token at work.
    tries, wait: (N,) 1 / p and w.
    path: (layers, E, 2 * N) the model's; bias: (2, N).
    keep: (horizons,) 1 - 1 / horizon.
    weights: (horizons + 1, 2) of the averages' log odds and of log(1 + visits since the last use), which `age` holds.
    row: (N,) an expert's layer.
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
    """Beginning where a cache line does: vector loads of others touch two."""
    size = int(np.prod(shape))
    room = np.zeros(size + LINE, F)
    begin = -room.ctypes.data % (LINE * room.itemsize) // room.itemsize
    return room[begin : begin + size].reshape(shape)


def _copied(values: NDArray[Any]) -> NDArray[np.float32]:
    copy = _zeros(*values.shape)
    copy[:] = values
    return copy


def haq_eviction(model: PathModel) -> Haq:
    """The rule before anything was used: averages are the calibration's, all experts were last used long ago."""
    layers, count = shape = model.usage.shape
    total, usage = layers * count, model.usage.ravel()
    bias, weights, age = model.bias.reshape(2, total), model.recency, np.log1p(np.arange(FORGOTTEN + 1))
    logits = bias + weights[:, :-1].sum(1, keepdims=True) * log_odds(usage) + weights[:, -1:] * age[FORGOTTEN]
    cost, tries, wait = (_zeros(total) for _ in range(3))
    values = _zeros(*shape).view(np.int32)
    state = Haq(
        values=values,
        order=values.reshape(-1),
        cost=cost,
        bits=cost.view(np.int32),
        average=_copied(np.tile(usage, len(HORIZONS))),
        used=_copied(usage),  # a token that leaves the averages as they are
        last=np.full(total, -FORGOTTEN),
        logits=_copied(logits),
        gain=_zeros(2, total),
        known=_zeros(2 * total),
        coming=_zeros(2 * total),
        tries=tries,
        wait=wait,
        bias=_copied(bias),
        path=_copied(model.path.reshape(layers, count, 2 * total)),
        keep=_copied(1 - 1 / HORIZONS),
        weights=np.ascontiguousarray(weights.T, F),
        age=age.astype(F),
        row=_copied(np.repeat(np.arange(layers), count)),
    )
    _expect(state)
    return state


@innermost
def _begin(state):
    state.known[:] = 0
    state.coming[:] = 0
    _expect(state)


@innermost
def _touch(state, layer, wanted, counts, tokens, now):
    layers, count = state.values.shape
    if layer == 0:
        _learn(state, now)
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
        _expect(state)


@innermost
def _add_paths(coming, path, wanted, counts, tokens):
    """Add the rows of the experts wanted, two at a time: this is where the rule's memory traffic is."""
    for index in range(0, len(wanted) - 1, 2):
        one, other = wanted[index], wanted[index + 1]
        share, other_share = F(counts[one] / tokens), F(counts[other] / tokens)
        row, other_row = path[one], path[other]
        for at in range(len(coming)):
            coming[at] += share * row[at] + other_share * other_row[at]
    if len(wanted) % 2:
        one = wanted[len(wanted) - 1]
        share, row = F(counts[one] / tokens), path[one]
        for at in range(len(coming)):
            coming[at] += share * row[at]


@innermost
def _learn(state, now):
    """Token `now` begins: averages take in the one before, logits are as if this one used no expert."""
    total, horizons = len(state.order), len(state.keep)
    used, last, newest = state.used, state.last, state.age[1]
    next_use, hazard, next_gain, hazard_gain = state.logits[0], state.logits[1], state.gain[0], state.gain[1]
    next_bias, hazard_bias = state.bias[0], state.bias[1]
    next_weight, hazard_weight = state.weights[horizons, 0], state.weights[horizons, 1]
    for index in range(len(last)):
        age = state.age[min(now + 1 - last[index], FORGOTTEN)]
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
def _expect(state):
    """1 / p and w of all experts by the path that is known."""
    tries, wait, sweep, total = state.tries, state.wait, F(len(state.values)), len(state.order)
    next_use, hazard = state.logits[0], state.logits[1]
    next_path, hazard_path = state.known[:total], state.known[total:]
    for index in range(len(tries)):
        against = _exp_minus(next_use[index] + next_path[index])  # the odds against: p = 1 / (1 + against)
        later = _exp_minus(hazard[index] + hazard_path[index])
        tries[index] = F(1) + against
        wait[index] = sweep * against * (F(1) + later) / (F(1) + against)


@innermost
def _refresh(state, layer):
    layers, total, sweep = len(state.values), len(state.order), F(len(state.values))
    # Layers passed: by the path of the token at work. (Indices from 0, as numba makes vector code of no others.)
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
    # Layers to come: by the latest whole token's.
    cost, row = state.cost[passed:], state.row[passed:]
    tries_known, wait = state.tries[passed:], state.wait[passed:]
    for index in range(len(cost)):
        distance = row[index] - F(layer)
        cost[index] = min(distance * tries_known[index], distance + wait[index])
    values, bits = state.order, state.bits
    for index in range(len(values)):
        values[index] = MOST - bits[index]


@innermost
def _exp_minus(z):
    """exp(-z), kept within exp(-10) and exp(10), right to 0.1 %: a polynomial for exp(-z / 16), squared four times.

    This is the innermost loop, and exp() itself is not inlined.
    """
    z = min(max(z, F(-10)), F(10))
    root = F(0.9999756) - z * (F(0.06247724) - z * (F(1.9549032e-3) - z * (F(4.1661e-5) - z * F(6.255097e-7))))
    root *= root
    root *= root
    root *= root
    return root * root


@innermost
def _log_odds(share):
    """`path_model.log_odds` without its logarithm: 2 atanh(x) by a rational function, right to 4e-6."""
    x = (share - F(0.5)) * F(2 / (1 + 2 * LEAST_SHARE))
    s = x * x
    above = F(2.00003534) + s * (F(-3.54842942) + s * (F(1.75630286) + s * F(-0.18012021)))
    below = F(1) + s * (F(-2.10722965) + s * (F(1.37884339) + s * F(-0.26729633)))
    return x * above / below


register(Haq, _touch, _begin, _refresh)
