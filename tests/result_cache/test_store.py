"""Test that the store keeps results, recomputes damaged ones, and never makes a run fail."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from children import in_child, killed
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.cli.cache import main
from haq_lab.result_cache.eviction import entries
from haq_lab.result_cache.store import Artifact, Store

GB = 1_000_000_000
A, B = "a" * 40, "b" * 40


def _key(number: int) -> str:
    return f"{number:040x}"


def _result(number: int = 0, size: int = 1000) -> Artifact:
    return Artifact({"x": torch.arange(size) * 0.1 + number}, {"number": number, "text": "ä"})


def _same(one: Artifact | None, other: Artifact) -> bool:
    return (
        one is not None
        and one.facts == other.facts
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
    )


def _never() -> Artifact:
    raise AssertionError("computed twice")


def test_a_result_is_computed_once(tmp_path):
    assert _same(Store(tmp_path, GB).fetch("stage", A, _result), _result())
    store = Store(tmp_path, GB)
    assert _same(store.fetch("stage", A, _never), _result())
    assert store.reused == {"stage": 1}
    assert store.get("stage", B) is None
    assert store.get("other", A) is None


def test_tensors_come_back_in_their_types_and_aligned_as_torch_aligns(tmp_path):
    tensors = {
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.arange(5).half(),
        "norm.weight": torch.randn(3, 5),
        "view": torch.randn(6, 4).t(),
    }
    Store(tmp_path, GB).put("stage", A, Artifact(tensors))
    found = Store(tmp_path, GB).get("stage", A)
    assert _same(found, Artifact(tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.tensors.values())  # sums depend on it


def test_a_store_without_a_folder_keeps_nothing():
    store = Store()
    assert _same(store.fetch("stage", A, _result), _result())
    assert store.get("stage", A) is None


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "nonsense"])
def test_a_damaged_result_is_computed_again_with_a_warning(tmp_path, capsys, suffix, damage):
    Store(tmp_path, GB).put("stage", A, _result())
    path = tmp_path / "stage" / f"{A}.{suffix}"
    data = bytearray(path.read_bytes())
    place = data.index(b'"sha256": "') + 14 if suffix == "json" else len(data) - 100  # the file's hash, or its bytes
    data[place] ^= 1
    changed = {"flip": bytes(data), "truncate": bytes(data[:-50]), "empty": b"", "nonsense": b"\x80\x04}q\x00."}
    path.write_bytes(changed[damage])
    store = Store(tmp_path, GB)
    assert _same(store.fetch("stage", A, lambda: _result(1)), _result(1))
    assert "result_cache: stage is computed again: " in capsys.readouterr().err
    assert _same(Store(tmp_path, GB).get("stage", A), _result(1))


def test_a_changed_fact_is_noticed(tmp_path):
    Store(tmp_path, GB).put("stage", A, Artifact(facts={"perplexity": 12.5}))
    path = tmp_path / "stage" / f"{A}.safetensors"
    path.write_bytes(path.read_bytes().replace(b"12.5", b"11.5"))
    assert Store(tmp_path, GB).get("stage", A) is None


def test_the_least_recently_used_is_evicted_first(tmp_path):
    store = Store(tmp_path, 15_000)
    for number in range(3):
        store.put("stage", _key(number), _result(number))
        os.utime(tmp_path / "stage" / f"{_key(number)}.json", (number + 1, number + 1))  # a time of 0 counts as missing
    assert _same(store.get("stage", _key(0)), _result())  # used now
    store.put("stage", _key(3), _result(3))
    left = {entry.data.stem for entry in entries(tmp_path)}
    assert {_key(0), _key(3)} <= left < {_key(number) for number in range(4)}
    assert sum(entry.bytes for entry in entries(tmp_path)) <= 15_000


def test_a_result_larger_than_the_limit_is_not_kept(tmp_path, capsys):
    store = Store(tmp_path, 1000)
    assert _same(store.fetch("stage", A, _result), _result())
    assert entries(tmp_path) == []
    assert "stage is not kept: its 0.0 GB are more than result_cache.max_size" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(small_disk, capsys):
    store = Store(small_disk, GB)
    assert _same(store.fetch("stage", A, _result), _result())
    for key in (B, "c" * 40):
        assert _same(store.fetch("stage", key, lambda: _result(2, 100_000)), _result(2, 100_000))
    assert capsys.readouterr().err.count("nothing more is kept") == 1
    assert [path.name for path in sorted((small_disk / "stage").iterdir())] == [f"{A}.json", f"{A}.safetensors"]
    assert _same(Store(small_disk, GB).get("stage", A), _result())


def test_a_simulated_full_disk(tmp_path, full_disk, capsys):
    assert _same(Store(tmp_path, GB).fetch("stage", A, _result), _result())
    assert "nothing more is kept" in capsys.readouterr().err
    assert entries(tmp_path) == []


def test_a_read_only_store_is_read(tmp_path, read_only, capsys):
    Store(tmp_path, GB).put("stage", A, _result())
    read_only(tmp_path)
    store = Store(tmp_path, GB)
    assert _same(store.fetch("stage", A, _never), _result())
    assert capsys.readouterr().err == ""
    for number in (1, 2):
        assert _same(store.fetch("stage", B, lambda number=number: _result(number)), _result(number))
    assert capsys.readouterr().err.count("cannot be written to (Read-only file system)") == 1


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert _same(Store(tmp_path / "file" / "store", GB).fetch("stage", A, _result), _result())
    assert "cannot be written to (Not a directory)" in capsys.readouterr().err


def test_killed_while_writing(tmp_path, capsys):
    for at in range(1, 20):
        dead = killed(in_child(lambda: Store(tmp_path, GB).put("stage", A, _result()), dies_at=at))
        found = Store(tmp_path, GB).get("stage", A)
        assert not dead or found is None
        assert capsys.readouterr().err == ""
        if not dead:
            break
    assert at > 3
    assert _same(found, _result())
    assert [path for path in (tmp_path / "stage").iterdir() if path.name.endswith(".part")]
    main(["gc", "--dir", str(tmp_path)])
    assert f"removed 0 results, 0.0 MB, and {at - 1} unfinished files" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == [f"{A}.json", f"{A}.safetensors"]


def test_two_processes_compute_it_once(tmp_path):
    def compute() -> Artifact:
        with (tmp_path / "computed").open("a") as stream:
            stream.write("x")
        time.sleep(0.05)
        return _result()

    def work() -> None:
        for key in (A, B, "c" * 40):
            assert _same(Store(tmp_path / "store", GB).fetch("stage", key, compute), _result())

    for child in [in_child(work) for _ in range(3)]:
        assert not killed(child)
    assert (tmp_path / "computed").read_text() == "xxx"


def test_a_killed_process_leaves_no_lock(tmp_path):
    def die() -> Artifact:
        os.kill(os.getpid(), 9)
        raise AssertionError

    assert killed(in_child(lambda: Store(tmp_path, GB).fetch("stage", A, die)))
    assert _same(Store(tmp_path, GB).fetch("stage", A, _result), _result())


# --- the command line


def test_listing_and_collecting(tmp_path, capsys):
    store = Store(tmp_path, GB)
    for number, stage in enumerate(["one", "one", "two"]):
        store.put(stage, _key(number), _result(number), about=f"model {number}")
    main(["ls", "--dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "one" in out
    assert "3 results, 0.0 MB" in out
    main(["ls", "--all", "--dir", str(tmp_path)])
    assert "model 2" in capsys.readouterr().out
    (tmp_path / "two" / f"{_key(2)}.json").unlink()
    main(["ls", "--all", "--dir", str(tmp_path)])
    assert "unfinished" in capsys.readouterr().out
    main(["gc", "--limit", "0B", "--dir", str(tmp_path)])
    assert "removed 3 results" in capsys.readouterr().out
    assert entries(tmp_path) == []
    main(["ls", "--dir", str(tmp_path / "nowhere")])
    assert "0 results" in capsys.readouterr().out


def test_other_files_stay(tmp_path):
    """A cache folder may contain models of the user; they are not removed."""
    others = ["model.safetensors", "config.json", ".model.safetensors.12.part", f"{A[1:]}.json", f"{A}.txt"]
    (tmp_path / "stage").mkdir()
    for name in others:
        (tmp_path / "stage" / name).write_text("mine")
        os.utime(tmp_path / "stage" / name, (0, 0))
    store = Store(tmp_path, 5_000)
    for number in range(3):
        store.put("stage", _key(number), _result(number))
    main(["gc", "--limit", "0B", "--dir", str(tmp_path)])
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == sorted(others)


@pytest.mark.parametrize("limit", ["20", "20 %", "20GX", "much"])
def test_a_limit_that_is_not_a_size(limit, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["gc", "--limit", limit, "--dir", str(tmp_path)])
    assert ended.value.code == 2
    assert (
        f"result_cache.max_size: '{limit}' is not a size. Choose one such as 20GB or 500MiB." in capsys.readouterr().err
    )


def test_the_record_has_the_description(tmp_path):
    Store(tmp_path, GB).put("stage", A, _result(), about="a model")
    record = json.loads((tmp_path / "stage" / f"{A}.json").read_text())
    assert record["about"] == "a model"
    assert Path(record["shard"]["file"]).suffix == ".safetensors"


@given(
    suffix=st.sampled_from(["json", "safetensors"]),
    content=st.one_of(
        st.binary(max_size=60),
        st.sampled_from(
            [b"[" * 100_000, b"{}", b"[]", b'{"shard": 3}', b'{"shard": {"file": []}}', b'{"about": 1e999}']
        ),
        st.tuples(st.integers(0, 2000), st.integers(1, 255)),
    ),
)
def test_any_bytes_in_an_entry_give_the_result_or_none(suffix, content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder, GB)
    store.put("stage", A, _result())
    path = folder / "stage" / f"{A}.{suffix}"
    if isinstance(content, tuple):  # change one byte
        changed, (place, value) = bytearray(path.read_bytes()), content
        changed[place % len(changed)] ^= value
        path.write_bytes(changed)
    else:
        path.write_bytes(content)
    read = store.get("stage", A)
    assert read is None or _same(read, _result())
    assert isinstance(entries(folder)[0].about(), str)
