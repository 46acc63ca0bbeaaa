"""A prefix is read as it was written, and a file of another model is refused."""

from __future__ import annotations

import pytest
import torch

from haq_lab.prefix.stored import Prefix
from haq_lab.utils.errors import UserError

SHAPE = (2, 3, 8)  # layers, heads, width


def make() -> Prefix:
    return Prefix((4, 5), "\n→", torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8))


def test_round_trip(tmp_path):
    prefix = make()
    for name in ("one", "two"):
        prefix.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = Prefix.open(tmp_path / "one", SHAPE)
    assert again.stamp() == {"tokens": [4, 5], "text": "\n→"}
    assert torch.equal(again.keys, prefix.keys)
    assert torch.equal(again.values, prefix.values)
    assert len(again) == 2


@pytest.mark.parametrize("shape", [(1, 3, 8), (2, 1, 8), (2, 3, 16)])
def test_another_models_prefix_is_refused(tmp_path, shape):
    make().save(tmp_path / "prefix.safetensors")
    with pytest.raises(UserError, match="does not fit the config"):
        Prefix.open(tmp_path / "prefix.safetensors", shape)


def test_a_file_without_tokens_is_refused(tmp_path):
    from haq_lab.storage.safetensors_file import write_shard

    write_shard(tmp_path / "prefix.safetensors", {"keys": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="does not name its tokens"):
        Prefix.open(tmp_path / "prefix.safetensors", SHAPE)
