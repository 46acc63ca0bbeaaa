"""k-means finds clear clusters, is reproducible, and never gets worse with more iterations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.zoo.kmeans import kmeans


def _within_cluster_sum(points, centroids, nearest):
    return float((points - centroids[nearest]).square().sum())


def test_clear_clusters_are_found():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    centres = 10 * torch.eye(3, 5)
    points = centres[truth] + torch.randn(300, 5, generator=generator)
    centroids, nearest = kmeans(points, 3, seed=0)
    assert all(len(nearest[truth == cluster].unique()) == 1 for cluster in range(3))
    for cluster in range(3):
        torch.testing.assert_close(centroids[nearest[cluster]], points[truth == cluster].mean(0))
    again, _ = kmeans(points, 3, seed=0)
    assert torch.equal(again, centroids)


@given(st.integers(0, 1000), st.integers(1, 6))
def test_every_point_is_at_its_nearest_and_more_iterations_are_no_worse(seed, count):
    points = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    early, late = (kmeans(points, count, seed, iterations) for iterations in (1, 30))
    assert _within_cluster_sum(points, *late) <= _within_cluster_sum(points, *early) + 1e-9
    centroids, nearest = late
    distances = torch.cdist(points, centroids)
    torch.testing.assert_close(distances.gather(1, nearest[:, None])[:, 0], distances.amin(1))


def test_fewer_distinct_points_than_clusters():
    centroids, nearest = kmeans(torch.ones(8, 2), 3, seed=0)
    assert torch.isfinite(centroids).all()
    assert len(nearest) == 8


@pytest.mark.parametrize("seed", [0, 1])
def test_first_centroids_are_within_cluster_sum(seed):
    points = torch.cat([torch.zeros(1000, 2), torch.full((1, 2), 1e3)])
    _, nearest = kmeans(points, 2, seed)
    assert nearest[-1] != nearest[0], "the far point has a cluster of its own"
