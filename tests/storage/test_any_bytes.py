"""Any bytes in a safetensors file give the right tensors or a UserError."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.storage.safetensors_file import describe_shard, read_shard, write_shard
from haq_lab.storage.safetensors_header import read_header
from haq_lab.utils.errors import UserError

TENSORS = {"a": torch.arange(8, dtype=torch.int8).view(2, 4), "b": torch.tensor(0.5)}


@given(place=st.integers(0, 500), value=st.integers(1, 255))
def test_a_changed_byte_is_always_found(place, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    shard = write_shard(folder / "a.safetensors", TENSORS, {"key": "value"})
    content = bytearray((folder / "a.safetensors").read_bytes())
    content[place % len(content)] ^= value
    (folder / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors"):
        read_shard(folder, shard)


def test_a_changed_shape_is_found(tmp_path):
    shard = write_shard(tmp_path / "a.safetensors", TENSORS, {})
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[2,4]", b"[4,2]"))
    with pytest.raises(UserError, match="its header does not match its hash"):
        read_shard(tmp_path, shard)


NUMBERS = st.integers(-1, 2**70) | st.booleans() | st.none()
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["I8", "F32", "F8", 3]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    },
)
HEADERS = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"[]", b"3", b'{"a": {"data_offsets": []}}']),
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES).map(
        lambda entries: json.dumps(entries).encode()
    ),
)
EMPTY = json.dumps({"a": {"dtype": "I8", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}).encode()


@given(header=HEADERS | st.just(EMPTY), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header_is_read_or_refused(header, length, tmp_path_factory):
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    with contextlib.suppress(UserError):
        tensors, _ = read_shard(path.parent, describe_shard(path))
        assert all(tensor.numel() == 0 for tensor in tensors.values())


def test_a_header_longer_than_the_limit_of_the_library(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40))
    with pytest.raises(ValueError, match="its header is too long"):
        read_header(path)
