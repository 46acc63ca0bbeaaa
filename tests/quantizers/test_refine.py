"""Test that refining a factor lowers its predicted error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import Sensitivity
from haq_lab.models.architectures import Group
from haq_lab.quantizers.haq.channel_search import DynamicError, refine
from haq_lab.quantizers.smoothing import ChannelMap

K = 12


def one_to_one() -> ChannelMap:
    layer = nn.Module()
    layer.up = nn.Linear(4, K)
    return ChannelMap(Group("up", "up", ("down",)), layer, K)


def error() -> DynamicError:
    inputs = torch.rand(50, K).pow(3) * torch.logspace(-1, 1, K)
    cost = Sensitivity(torch.rand(K), torch.rand(7))
    return DynamicError(inputs, torch.full((50,), 1 / 50), torch.rand(7, K), cost, torch.rand(K))


def test_the_gradient_equals_finite_differences():
    predicted, place = error(), torch.randn(K, dtype=torch.float64) * 0.3
    predicted = DynamicError(
        predicted.inputs.double(),
        predicted.share.double(),
        predicted.weight.double(),
        Sensitivity(predicted.cost.channels.double(), predicted.cost.outputs.double()),
        predicted.variance.double(),
    )
    _, gradient = predicted(place.exp())
    for channel in range(K):
        step = torch.zeros(K, dtype=torch.float64)
        step[channel] = 1e-6
        slope = (predicted((place + step).exp())[0] - predicted((place - step).exp())[0]) / 2e-6
        torch.testing.assert_close(gradient[channel], torch.tensor(slope, dtype=torch.float64), rtol=1e-4, atol=1e-9)


def test_refining_lowers_the_error_to_near_the_minimum():
    """The error is convex in the logarithms, so two starts end at about the same error."""
    predicted = error()
    ends = []
    for start in (torch.ones(K), torch.logspace(-0.3, 0.3, K)):
        end = refine(start, predicted, one_to_one())
        assert predicted(end)[0] < 0.9 * predicted(start)[0]
        ends.append(predicted(end)[0])
    assert max(ends) < 1.1 * min(ends)


def test_channels_that_share_a_row_keep_one_factor():
    channels = one_to_one()
    channels.rows = torch.arange(K) // 3
    channels.source_rows = K // 3
    factor = refine(torch.ones(K), error(), channels)
    shared: Tensor = factor.view(-1, 3)
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    assert factor.unique().numel() > 1


def test_it_is_adams_descent_of_the_error_with_a_pull_to_the_start():
    """Against the same descent written plainly: log-error's gradient plus 0.01 times the distance from the start."""
    predicted, start = error(), torch.zeros(K)
    place, mean, square = start, torch.zeros(K), torch.zeros(K)
    best, least = torch.ones(K), float("inf")
    for step in range(1, 61):
        value, gradient = predicted(place.exp())
        if value < least:
            best, least = place.exp(), value
        gradient = gradient / value + 0.01 * (place - start)
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        unbiased, spread = mean / (1 - 0.8**step), (square / (1 - 0.95**step)).sqrt()
        place = place - 0.05 * (1 - step / 60) * unbiased / (spread + 1e-8)
    torch.testing.assert_close(refine(torch.ones(K), predicted, one_to_one()), best, rtol=1e-4, atol=1e-5)
