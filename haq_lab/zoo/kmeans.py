"""k-means with k-means++ seeding (Arthur and Vassilvitskii, 2007), vectorised and repeatable."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(points: Tensor, count: int, seed: int, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations until no point changes its cluster.

    Args:
        points: (n, d) floating.
        count: Clusters, at most as many as there are distinct points.
        seed: Of the first centroids.
        iterations: At most so many.

    Returns:
        Centroids (count, d) and each point's cluster (n,) int64.
    """
    centroids = _spread(points, count, torch.Generator().manual_seed(seed))
    nearest = _distances(points, centroids).argmin(1)
    for _ in range(iterations):
        members = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        occupied = members[:, None] > 0
        centroids = torch.where(occupied, sums / members.clamp(min=1)[:, None], centroids)
        before, nearest = nearest, _distances(points, centroids).argmin(1)
        if torch.equal(before, nearest):
            break
    return centroids, nearest


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """First centroids: points drawn with a probability that grows with the distance from those drawn before."""
    first = torch.randint(len(points), (1,), generator=generator)
    chosen = points[first]
    while len(chosen) < count:
        weight = _distances(points, chosen).amin(1).cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=weight.dtype) * weight[-1]
        chosen = torch.cat([chosen, points[torch.searchsorted(weight, drawn).clamp(max=len(points) - 1)]])
    return chosen


def _distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances (n, count)."""
    squares = points.square().sum(1, keepdim=True) + centroids.square().sum(1)
    return (squares - 2 * points @ centroids.t()).clamp(min=0)
