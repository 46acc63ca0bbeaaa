"""Guesses: most wanted first, no more than asked for."""

from __future__ import annotations

import torch
from torch import nn

from haq_lab.offload.policies.prefetch import NextGate, NextOnPath


class Router(nn.Module):
    """Chooses what it was told to."""

    def __init__(self, weights, experts):
        super().__init__()
        self.answer = None, torch.tensor(weights), torch.tensor(experts)

    def forward(self, hidden):
        return self.answer


def test_the_next_gate_sums_the_tokens_weights():
    gates = NextGate([nn.Identity(), Router([[0.6, 0.4], [0.7, 0.3]], [[5, 2], [2, 1]])])
    nothing = torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.long)
    assert gates.guess(0, *nothing, k=2) == [2, 5]
    assert gates.guess(0, *nothing, k=9) == [2, 5, 1]


def test_the_path_counts_what_came_after(make_trace):
    trace = make_trace(tokens=200, layers=3)
    guess = NextOnPath(trace).guess(1, torch.zeros(1, 4), torch.tensor([[3, 6]]), 8)
    likelihood = [0.0] * 8
    for known in (3, 6):
        after = [int(b) for token in trace.experts if known in token[1] for b in token[2]]
        for expert in range(8):
            likelihood[expert] += after.count(expert) / max(len(after), 1)
    assert guess == sorted(range(8), key=lambda expert: -likelihood[expert])
