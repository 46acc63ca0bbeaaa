"""The keys and values of a prefix are those that the model computes for its tokens."""

from __future__ import annotations

import pytest
import torch

from haq_lab.calibration.prefix_states import cached_prefix, compute_prefix
from haq_lab.result_cache.store import Store
from tests.models.test_layerwise import whole_of


def test_values_are_those_of_the_models_own_cache(tiny):
    prefix = compute_prefix(tiny, (5, 6, 7), "abc")
    cache = whole_of(tiny.folder)(torch.tensor([[5, 6, 7]]), use_cache=True).cache
    expected = torch.stack([layer.values[0] for layer in cache.layers])
    torch.testing.assert_close(prefix.states.values, expected, rtol=1e-5, atol=1e-5)
    assert prefix.states.keys.shape == expected.shape
    assert (prefix.tokens, prefix.text) == ((5, 6, 7), "abc")


@pytest.mark.parametrize("architecture", ["llama"])
def test_the_result_cache_gives_the_same_bits(tiny, tmp_path):
    computed = compute_prefix(tiny, (5, 6), "").states
    for reused in ({}, {"prefix": 1}):
        store = Store(tmp_path, 1 << 30)
        found = cached_prefix(store, tiny, (5, 6), "").states
        assert torch.equal(found.keys, computed.keys)
        assert torch.equal(found.values, computed.values)
        assert store.reused == reused
    other = cached_prefix(store, tiny, (6, 5), "").states
    assert not torch.equal(other.keys, computed.keys)
