"""Models with equal labels get names that differ in as little as possible."""

from __future__ import annotations

import pytest

from haq_lab.results.model_names import distinct_names


@pytest.mark.parametrize(
    ("models", "names"),
    [
        ([("smol", {}), ("opt", {"name": "x/opt"}), ("smol", {})], ["smol", "opt", "smol"]),
        ([("final", {"name": "/r/a/final"}), ("final", {"name": "/r/b/final"})], ["a/final", "b/final"]),
        ([("final", {"path": "/a/x/final/"}), ("final", {"path": "/b/x/final"})], ["a/x/final", "b/x/final"]),
        (
            [("opt", {"name": "o/opt", "revision": None}), ("opt", {"name": "o/opt", "revision": "v2"})],
            ["opt revision=None", "opt revision=v2"],
        ),
        ([("tiny", {"layers": 2, "seed": 0}), ("tiny", {"layers": 2, "seed": 1})], ["tiny seed=0", "tiny seed=1"]),
    ],
)
def test_names(models, names):
    assert distinct_names(models) == names
