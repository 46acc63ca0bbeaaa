"""The `haq` rule: the resident expert leaves that promises fewest hits for the time it holds its slot.

A path model (`path_model.py`) says how probably an expert is used at its layer's next visit, p, and at each one
after that, h. The next visit is d layers away, a sweep over the model is L layers. Keeping the expert until then
earns p hits in d steps; keeping it until it is used earns one in d + w, w = L (1 - p) / h. The better of the two rates
is its value: with a known future that is Belady's order, nearest use first.

Layers that are still to come in this token are judged by the latest whole token's path, so their p and w stand until
they are visited and are worked out once a token; those of layers passed change with every choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.cache import teach
from haq_lab.offload.compiled import innermost
from haq_lab.offload.path_model import FORGOTTEN, HORIZONS, LEAST_SHARE, PathModel

F = np.float32
LINE = 16  # numbers


class ExpectedWait(NamedTuple):
    """`rates` (layers, E), whose bits `values` are, and what they are computed from, float32.

    average: (layers, horizons * E) moving averages of use; last: (layers, E) int64 token of the last use.
    logits: (2, layers, E) of use at the next visit and of the hazard after it, path aside.
    known, coming: (2, layers, E) path terms from the latest whole token, and from the token at work.
    tries, wait: (layers, E) 1 / p and w.
    keep: (horizons * E,) 1 - 1 / horizon; weights: (2, horizons * E) of the averages' log odds; terms: room for both.
    age: (FORGOTTEN + 1,) log(1 + visits since the last use); age_weight: (2,).
    row: (layers, E) an expert's layer.
    """

    values: np.ndarray
    rates: np.ndarray
    average: np.ndarray
    last: np.ndarray
    logits: np.ndarray
    known: np.ndarray
    coming: np.ndarray
    tries: np.ndarray
    wait: np.ndarray
    bias: np.ndarray
    path: np.ndarray
    keep: np.ndarray
    weights: np.ndarray
    terms: np.ndarray
    age: np.ndarray
    age_weight: np.ndarray
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


def expected_wait(model: PathModel) -> ExpectedWait:
    """The rule before anything was used."""
    layers, count = shape = model.usage.shape
    size = len(HORIZONS)
    rates, tries, wait = (_zeros(*shape) for _ in range(3))
    logits, known, coming = (_zeros(2, *shape) for _ in range(3))
    state = ExpectedWait(
        values=rates.view(np.int32),
        rates=rates,
        average=_copied(np.tile(model.usage, size)),
        last=np.full(shape, -FORGOTTEN),
        logits=logits,
        known=known,
        coming=coming,
        tries=tries,
        wait=wait,
        bias=np.ascontiguousarray(model.bias),
        path=_copied(model.path.reshape(layers, count, -1)),
        keep=_copied(np.repeat(1 - 1 / HORIZONS, count)),
        weights=_copied(np.repeat(model.recency[:, :size], count, 1)),
        terms=_zeros(2, size * count),
        age=np.log1p(np.arange(FORGOTTEN + 1)).astype(F),
        age_weight=np.ascontiguousarray(model.recency[:, size]).astype(F),
        row=_copied(np.repeat(np.arange(layers), count).reshape(shape)),
    )
    for layer in range(layers):
        _judge(state, layer, 0)
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
        state.coming[:] = 0
    average, keep = state.average[layer], state.keep
    for index in range(len(keep)):
        average[index] *= keep[index]
    for expert in wanted:
        share = F(counts[expert] / tokens)
        for index in range(expert, len(keep), count):
            average[index] += share * (F(1) - keep[index])
        state.last[layer, expert] = now
    _add_paths(state.coming.reshape(-1), state.path[layer], wanted, counts, tokens)
    _judge(state, layer, now)
    if layer == layers - 1:
        known, coming = state.known.reshape(-1), state.coming.reshape(-1)
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
def _judge(state, layer, now):
    """The layer's logits from what was used lately."""
    average, count = state.average[layer], state.values.shape[1]
    use_terms, hazard_terms = state.terms[0], state.terms[1]
    use_weights, hazard_weights = state.weights[0], state.weights[1]
    for index in range(len(average)):
        feature = _log_odds(average[index])
        use_terms[index] = use_weights[index] * feature
        hazard_terms[index] = hazard_weights[index] * feature
    for expert in range(count):
        age = state.age[min(now + 1 - state.last[layer, expert], FORGOTTEN)]
        use = state.bias[0, layer, expert] + state.age_weight[0] * age
        hazard = state.bias[1, layer, expert] + state.age_weight[1] * age
        for index in range(expert, len(average), count):
            use += use_terms[index]
            hazard += hazard_terms[index]
        state.logits[0, layer, expert] = use
        state.logits[1, layer, expert] = hazard


@innermost
def _expect(state):
    """1 / p and w of all experts by the path that is known."""
    tries, wait, sweep = state.tries.reshape(-1), state.wait.reshape(-1), F(len(state.values))
    next_use, hazard = state.logits[0].reshape(-1), state.logits[1].reshape(-1)
    next_path, hazard_path = state.known[0].reshape(-1), state.known[1].reshape(-1)
    for index in range(len(tries)):
        against = _exp_minus(next_use[index] + next_path[index])  # the odds against: p = 1 / (1 + against)
        later = _exp_minus(hazard[index] + hazard_path[index])
        tries[index] = F(1) + against
        wait[index] = sweep * against * (F(1) + later) / (F(1) + against)


@innermost
def _refresh(state, layer):
    layers, sweep = len(state.values), F(len(state.values))
    # Layers passed: by the path of the token at work. (Indices from 0, as numba makes vector code of no others.)
    rates, row = state.rates[: layer + 1].reshape(-1), state.row[: layer + 1].reshape(-1)
    next_use, hazard = state.logits[0].reshape(-1), state.logits[1].reshape(-1)
    next_path, hazard_path = state.coming[0].reshape(-1), state.coming[1].reshape(-1)
    ahead = F(layers - layer)
    for index in range(len(rates)):
        against = _exp_minus(next_use[index] + next_path[index])
        later = _exp_minus(hazard[index] + hazard_path[index])
        tries, distance = F(1) + against, row[index] + ahead
        once = distance * tries  # as below, all times 1 + against
        rates[index] = tries / min(once * tries, once + sweep * against * (F(1) + later))
    # Layers to come: by the latest whole token's.
    rates, row = state.rates[layer + 1 :].reshape(-1), state.row[layer + 1 :].reshape(-1)
    tries_known, wait = state.tries[layer + 1 :].reshape(-1), state.wait[layer + 1 :].reshape(-1)
    for index in range(len(rates)):
        distance = row[index] - F(layer)
        rates[index] = F(1) / min(distance * tries_known[index], distance + wait[index])


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


teach(ExpectedWait, _touch, _begin, _refresh)
