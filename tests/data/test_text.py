"""Rows of text from files of every format, and the errors for files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from haq_lab.calibration.dataset import OVERLAP_RUN, _hashes_of_runs
from haq_lab.data.text import load_rows, python_docs
from haq_lab.data.windows import encode, own_documents
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
    assert own_documents(str(_write(tmp_path, ".txt")), "x").joined == "\n".join(ROWS) + "\n"
    assert own_documents(str(_write(tmp_path, ".jsonl")), "x").joined == "\n\n".join(ROWS)


def test_a_missing_file_names_the_setting_and_the_nearest(tmp_path):
    (tmp_path / "test.txt").write_text("a")
    with pytest.raises(UserError, match=r"^data\.text\.path: there is no file .*tset\.txt.*did you mean 'test\.txt'"):
        load_rows("text", "train", str(tmp_path / "tset.txt"), "data.text.path")


def test_the_raw_file_of_wikitext_gives_the_rows_of_the_hub(tmp_path):
    """The hub has an empty row for each blank line, which is " \\n" in wiki.test.raw."""
    raw = " \n = Title = \n \n First paragraph . \n Second\u2028one . \n \n = = Part = = \n \n Third . \n"
    path = tmp_path / "wiki.test.raw"
    path.write_text(raw, encoding="utf-8")
    hub = [f"{line}\n" if line.strip() else "" for line in raw.split("\n")[:-1]]
    assert load_rows("wikitext2", "test", str(path), "x") == hub
    assert load_rows("c4", "train", str(path), "x") == [f"{line}\n" for line in raw.split("\n")[:-1]]


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
    monkeypatch.setattr("haq_lab.data.text.hub_is_reachable", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: offline.append(datasets.config.HF_HUB_OFFLINE) or {})
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(UserError):
        load_rows("wikitext2", "test", None, "data.x.path")
    assert offline == [True]
    assert before == datasets.config.HF_HUB_OFFLINE


def test_a_text_of_ones_own_needs_a_path():
    with pytest.raises(UserError, match=r"data\.text\.path: a file is needed"):
        own_documents(None, "data.text.path")


def test_the_parts_of_python_docs_share_no_run():
    parts = [encode(byte_tokenizer(), python_docs(part))[None] for part in ("calibration", "evaluation")]
    calibration, evaluation = (_hashes_of_runs(part, OVERLAP_RUN) for part in parts)
    assert len(np.intersect1d(calibration, evaluation)) == 0
    assert min(part.shape[1] for part in parts) > 100_000
    assert parts[0].numel() / sum(part.numel() for part in parts) == pytest.approx(0.6, abs=0.01)
