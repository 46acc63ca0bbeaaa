"""Test the file format: the safetensors library can read it, an expert is contiguous, and damage is reported."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from haq_lab.storage.safetensors_file import byte_range, read_shard, write_shard
from haq_lab.utils.errors import UserError


@pytest.fixture
def tensors():
    """A layer with a norm and three experts, in a mixed order; bfloat16 has no numpy type."""
    made = {}
    for expert in (2, 0, 1):
        for name in ("gate_proj", "down_proj"):
            made[f"model.layers.0.mlp.experts.{expert}.{name}.weight"] = torch.randint(-127, 128, (4, 8)).to(torch.int8)
            made[f"model.layers.0.mlp.experts.{expert}.{name}.weight_scale"] = torch.rand(4)
            made[f"model.layers.0.mlp.experts.{expert}.{name}.input_scale"] = torch.rand(())
    made["model.layers.0.norm.weight"] = torch.rand(8).bfloat16()
    return made


def test_round_trip_also_through_the_format_s_own_library(tensors, tmp_path):
    shard = write_shard(tmp_path / "a.safetensors", tensors, {"schemes": "{}"})
    mine, metadata = read_shard(tmp_path, shard)
    theirs = load_file(tmp_path / "a.safetensors")
    assert metadata == {"schemes": "{}"}
    for read in (mine, theirs):
        assert {*read} == {*tensors}
        assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)
    assert write_shard(tmp_path / "b.safetensors", tensors, {"schemes": "{}"}).sha256 == shard.sha256


def test_an_expert_is_one_range_of_bytes(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    write_shard(path, tensors, {})
    content = path.read_bytes()
    for expert in range(3):
        names = [name for name in tensors if f".experts.{expert}." in name]
        start, end = byte_range(path, names)
        assert end - start == sum(tensors[name].nbytes for name in names)
        assert tensors[names[0]].numpy().tobytes() in content[start:end]
    with pytest.raises(UserError, match="are not contiguous"):
        byte_range(path, [name for name in tensors if ".experts.1." not in name])
    with pytest.raises(UserError, match="no tensor 'absent'"):
        byte_range(path, ["absent"])


@pytest.mark.parametrize("where", [0, 20, -1])
def test_a_changed_byte_is_found(where, tensors, tmp_path):
    shard = write_shard(tmp_path / "a.safetensors", tensors, {})
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[where] ^= 0x10
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors"):
        read_shard(tmp_path, shard)


def test_a_changed_weight_is_named(tensors, tmp_path):
    shard = write_shard(tmp_path / "a.safetensors", tensors, {})
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    start, _ = byte_range(tmp_path / "a.safetensors", [name])
    with (tmp_path / "a.safetensors").open("r+b") as stream:
        stream.seek(start)
        value = stream.read(1)[0]
        stream.seek(start)
        stream.write(bytes([value ^ 1]))
    with pytest.raises(UserError, match=f"tensor '{name}' does not match"):
        read_shard(tmp_path, shard)


def test_truncated_or_absent(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    shard = write_shard(path, tensors, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        read_shard(tmp_path, shard)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        read_shard(tmp_path, shard)
