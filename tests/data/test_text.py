"""Rows of text from files of every format, and the errors for files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from haq_lab.calibration.dataset import OVERLAP_RUN, _hashes_of_runs
from haq_lab.data.text import load_rows, python_docs
from haq_lab.data.windows import encode, own_text
from haq_lab.models.random_tiny import byte_tokenizer
from haq_lab.utils.errors import UserError

ROWS = ["first row", "zweite Zeile, äöü", "third"]


def _write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows [1] {suffix[1:]} ü{suffix}"  # blanks, brackets and umlauts are no pattern
    if suffix in (".txt", ".text"):
        path.write_text("\n".join(ROWS) + "\n", encoding="utf-8")
    elif suffix == ".parquet":
        pd.DataFrame({"text": ROWS, "other": 1}).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".txt", ".text", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    path = _write(tmp_path, suffix)
    rows = load_rows("wikitext2", "test", str(path), "data.wikitext2.path")
    assert [row.rstrip("\n") for row in rows] == ROWS


def test_own_text_keeps_lines_and_separates_documents(tmp_path):
    assert own_text(str(_write(tmp_path, ".txt")), "x") == "\n".join(ROWS) + "\n"
    assert own_text(str(_write(tmp_path, ".jsonl")), "x") == "\n\n".join(ROWS)


def test_a_missing_file_names_the_setting_and_the_nearest(tmp_path):
    (tmp_path / "test.txt").write_text("a")
    with pytest.raises(UserError, match=r"^data\.text\.path: there is no file .*tset\.txt.*did you mean 'test\.txt'"):
        load_rows("text", "train", str(tmp_path / "tset.txt"), "data.text.path")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nx\n", "ends in .txt, .text, .jsonl"),
        ("a.jsonl", '{"txt": "x"}\n', r"no field 'text'.*: txt .*did you mean 'txt'"),
        ("b.jsonl", "{broken\n", "cannot be read as json"),
        ("c.jsonl", '{"text": null}\n{"text": "x"}\n', "rows whose field 'text' is not a string"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_rows("text", "train", str(tmp_path / name), "calibration.path")


@pytest.mark.parametrize("text", ["wikitext2", "c4"])
def test_the_error_without_hub_and_path_names_both_ways_out(text, monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"Give it network, or a local copy: data\.x\.path=FILE"):
        load_rows(text, "train", None, "data.x.path")


def test_datasets_uses_only_its_cache_if_the_hub_does_not_answer(monkeypatch):
    import datasets

    offline = []
    monkeypatch.setattr("haq_lab.data.text.hub_answers", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: offline.append(datasets.config.HF_HUB_OFFLINE) or {})
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(UserError):
        load_rows("wikitext2", "test", None, "data.x.path")
    assert offline == [True]
    assert before == datasets.config.HF_HUB_OFFLINE


def test_a_text_of_ones_own_needs_a_path():
    with pytest.raises(UserError, match=r"data\.text\.path: a file is needed"):
        own_text(None, "data.text.path")


def test_the_parts_of_python_docs_share_no_run():
    parts = [encode(byte_tokenizer(), python_docs(part))[None] for part in ("calibration", "evaluation")]
    calibration, evaluation = (_hashes_of_runs(part, OVERLAP_RUN) for part in parts)
    assert len(np.intersect1d(calibration, evaluation)) == 0
    assert min(part.shape[1] for part in parts) > 100_000
