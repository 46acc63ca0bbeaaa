"""A damaged run folder costs one warning line that names the file, and the other runs are still shown."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haq_lab.cli.results import main
from haq_lab.results.load import load, show
from haq_lab.results.read_record import read_record

METRICS = {"perplexity.c4": 31.0, "perplexity_fp.c4": 30.0}
GOOD = {"schema": 1, "run": {"model": "m", "quantizer": "rtn"}, "config": {}, "protocol": {}, "metrics": METRICS}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PART = st.sampled_from(["run", "config", "protocol", "metrics", "not_finite", "error"])


def _write(folder: Path, content: bytes, name: str = "results.json") -> None:
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"run": 1}',
        b'{"metrics": {"a": "x"}}',
        b'{"metrics": {"a": NaN}}',
    ],
)
def test_a_damaged_file_is_named_in_one_line(content, tmp_path, capsys):
    _write(tmp_path / "bad", content)
    _write(tmp_path / "good", json.dumps(GOOD).encode())
    main([str(tmp_path)])
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert str(tmp_path / "bad" / "results.json") in printed.err
    assert "31.0000" in printed.out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | st.builds(lambda part, value: json.dumps(GOOD | {part: value}).encode(), PART, VALUES))
def test_any_bytes_leave_the_other_runs_readable(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bad").mkdir()
        for name in ("results.json", "error.json", "config.yaml"):
            (Path(folder) / "bad" / name).write_bytes(content)
        _write(Path(folder) / "good", json.dumps(GOOD).encode())
        runs = load(folder)
        assert len(runs) == 2
        assert 31.0 in list(runs["perplexity.c4"])


def test_a_metric_that_is_null_is_shown_with_its_reason(tmp_path, capsys):
    null = GOOD | {"metrics": METRICS | {"perplexity.c4": None}, "not_finite": {"perplexity.c4": "too large"}}
    _write(tmp_path / "run", json.dumps(null).encode())
    (run,) = load(tmp_path).to_dict("records")
    assert run["null.perplexity.c4"] == "too large"
    show(load(tmp_path))
    assert capsys.readouterr().out.count("│ null") == 1


def test_a_file_that_does_not_exist_is_no_damage(tmp_path, capsys):
    assert read_record(tmp_path / "results.json") is None
    assert capsys.readouterr().err == ""
