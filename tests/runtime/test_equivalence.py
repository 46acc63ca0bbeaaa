"""Quantised matrices are nearly equal if they differ only by float32 rounding."""

from __future__ import annotations

import pytest
import torch

from haq_lab.int8.numerics import quantize_activations
from haq_lab.runtime.equivalence import make_probe, nearly_equal

ROWS = quantize_activations(make_probe(64, torch.device("cpu")), "token", None)


def changed(beside: int = 0, by: int = 1, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    levels = ROWS[0].clone()
    levels.view(-1)[:beside] += torch.where(levels.view(-1)[:beside] > 0, -by, by).to(torch.int8)
    return levels, ROWS[1].flatten() * scale


@pytest.mark.parametrize("change", [{}, {"beside": 10}, {"scale": 1 + 5e-6}])
def test_rounding_differences_are_accepted(change):
    assert nearly_equal(changed(**change), ROWS)


@pytest.mark.parametrize("change", [{"beside": 1, "by": 2}, {"beside": 11}, {"scale": 1 + 2e-5}])
def test_larger_differences_are_rejected(change):
    assert not nearly_equal(changed(**change), ROWS)


def test_probe_rows_have_very_different_magnitudes():
    sizes = make_probe(64, torch.device("cpu")).norm(dim=1)
    assert sizes[0] < 1e-2
    assert sizes[-1] > 1e2
    assert torch.equal(make_probe(64, torch.device("cpu")), make_probe(64, torch.device("cpu")))
