"""Cluster points with k-means and k-means++ seeding (Arthur and Vassilvitskii, 2007). It is deterministic."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(points: Tensor, count: int, seed: int, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """Cluster points with Lloyd's algorithm until no point changes its cluster.

    Args:
        points: (n, d) floating-point.
        count: Number of clusters. At most the number of distinct points.
        seed: Seed for drawing the first centroids.
        iterations: Largest number of iterations.

    Returns:
        Centroids (count, d) and the index of each point's cluster (n,) int64.
    """
    centroids = _first_centroids(points, count, torch.Generator().manual_seed(seed))
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


def _first_centroids(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw points with a probability proportional to the squared distance from the nearest earlier one (k-means++)."""
    first = torch.randint(len(points), (1,), generator=generator)
    chosen = points[first]
    while len(chosen) < count:
        weight = _distances(points, chosen).amin(1).cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=weight.dtype) * weight[-1]
        chosen = torch.cat([chosen, points[torch.searchsorted(weight, drawn).clamp(max=len(points) - 1)]])
    return chosen


def _distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the squared distances (n, count) between points and centroids."""
    squares = points.square().sum(1, keepdim=True) + centroids.square().sum(1)
    return (squares - 2 * points @ centroids.t()).clamp(min=0)
