"""Compare the protocols with the published loops, and refuse texts that are too short."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from haq_lab.calibration.dataset import Calibration, check_overlap
from haq_lab.data import windows as module
from haq_lab.data.text import fingerprint
from haq_lab.data.windows import C4, C4New, PythonDocs, Text, TrainingText, Wikitext2, Windows
from haq_lab.models.random_tiny import byte_tokenizer
from haq_lab.utils.errors import UserError

TOKENIZER = byte_tokenizer()


@pytest.fixture
def wikitext(tmp_path):
    """A file in WikiText's manner: headings, blank lines, paragraphs."""
    rows = [[" \n", f" = Part {part} = \n", f" Some words on subject {part * 7919} . \n"] for part in range(40)]
    path = tmp_path / "wikitext.txt"
    path.write_text("".join(line for part in rows for line in part))
    return path


@pytest.fixture
def documents(tmp_path):
    """C4 in small: documents of all lengths."""
    draw = random.Random(5)
    rows = ["".join(draw.choices("abcdefgh ijkl", k=draw.randint(1, 200))) for _ in range(60)]
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps({"text": row, "url": "x"}) + "\n" for row in rows))
    return path, rows


def test_wikitext2_joins_rows_by_blank_lines_and_drops_the_tail(wikitext):
    windows = Wikitext2(path=str(wikitext), seqlen=100).load(TOKENIZER)
    with wikitext.open() as stream:  # as published: "\n\n".join(testdata["text"]), nsamples = numel // seqlen
        ids = TOKENIZER("\n\n".join(line if line.strip() else "" for line in stream))["input_ids"]
    expected = [ids[i * 100 : (i + 1) * 100] for i in range(len(ids) // 100)]
    assert windows.tokens.tolist() == expected
    stamp = windows.protocol
    assert (stamp["windows"], stamp["tokens_scored"]) == (len(expected), 99 * len(expected))
    assert (stamp["seqlen"], stamp["stride"], stamp["level"], stamp["split"]) == (100, 100, "token", "test")
    assert stamp["comparable_with"] == []  # neither the hub's text nor 2,048 tokens
    assert Wikitext2(path=str(wikitext), seqlen=100, windows=3).load(TOKENIZER).tokens.tolist() == expected[:3]


def test_c4_draws_the_crops_that_gptq_draws(documents):
    path, rows = documents
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            i = random.randint(0, len(rows) - 1)
            ids = TOKENIZER(rows[i])["input_ids"]
            if len(ids) > 50:
                break
        i = random.randint(0, len(ids) - 50 - 1)
        expected.append(ids[i : i + 50])
    assert C4(path=str(path), seqlen=50).load(TOKENIZER).tokens.tolist() == expected
    assert C4(path=str(path), seqlen=50, windows=9).load(TOKENIZER).tokens.tolist() == expected[:9]


def test_c4_new_joins_1100_documents_by_spaces(documents):
    path, rows = documents
    ids = TOKENIZER(" ".join(rows))["input_ids"]
    expected = [ids[i * 16 : (i + 1) * 16] for i in range(256)]
    assert C4New(path=str(path), seqlen=16).load(TOKENIZER).tokens.tolist() == expected
    assert C4New(path=str(path), seqlen=64).load(TOKENIZER).tokens.shape == (len(ids) // 64, 64)


def test_only_the_published_setting_claims_published_tables(monkeypatch):
    monkeypatch.setattr("haq_lab.data.windows.load_rows", lambda *arguments: ["word " * 5000])
    assert Wikitext2().load(TOKENIZER).protocol["comparable_with"]
    assert not Wikitext2(windows=2).load(TOKENIZER).protocol["comparable_with"]
    assert not Wikitext2(seqlen=1024).load(TOKENIZER).protocol["comparable_with"]


@pytest.mark.parametrize("kind", [Wikitext2, C4, C4New, Text])
def test_a_text_shorter_than_a_window_is_refused(kind, tmp_path):
    for content in ("too short\n", ""):
        (tmp_path / "short.txt").write_text(content)
        with pytest.raises(UserError, match=r"^data\.\w+\.seqlen: .*(less than one window|no document|is empty)"):
            kind(path=str(tmp_path / "short.txt"), seqlen=64).load(TOKENIZER)


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"seqlen": 1}, {"windows": -1}, {"seqlen": "long"}])
def test_counts_that_make_no_window_are_refused(wrong):
    with pytest.raises(ValidationError):
        Wikitext2(**wrong)


@pytest.mark.parametrize("text", ["wikitext2", "c4", "c4_new", "text"])
def test_calibration_is_repeatable_and_follows_its_seed(text, documents):
    path, _ = documents
    load = Calibration(text=text, path=str(path), samples=8, seqlen=40, seed=3).load
    tokens = load(TOKENIZER).tokens
    assert tokens.shape == (8, 40)
    assert torch.equal(tokens, load(TOKENIZER).tokens)
    other = Calibration(text=text, path=str(path), samples=8, seqlen=40, seed=4).load(TOKENIZER)
    assert not torch.equal(tokens, other.tokens)


def test_calibration_refuses_what_gives_no_windows(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match=r"^calibration\.seqlen: the text has 5 tokens"):
        Calibration(text="text", path=str(tmp_path / "short.txt"), seqlen=64).load(TOKENIZER)
    with pytest.raises(UserError, match=r"^calibration\.path: python_docs has no file"):
        Calibration(text="python_docs", path="x.txt")
    with pytest.raises(ValidationError):
        Calibration(text="python_docs", samples=0)


def test_a_registered_class_is_a_calibration_text(monkeypatch):
    monkeypatch.setattr(module, "TEXTS", texts := dict(module.TEXTS))
    monkeypatch.setattr("haq_lab.calibration.dataset.TEXTS", texts)

    @module.register("digits")
    class Digits:
        def training_text(self, setting):
            return TrainingText(["0123456789" * 20], source="nowhere")

    windows = Calibration("digits", samples=3, seqlen=40).load(TOKENIZER)
    assert windows.tokens.shape == (3, 40)
    assert windows.protocol["source"] == "nowhere"
    with pytest.raises(UserError, match=r"^calibration\.path: digits has no file"):
        Calibration("digits", path="x.txt")


def test_calibration_refuses_an_unknown_text():
    with pytest.raises(UserError, match=r"^calibration\.text: 'wikitxt2' is not one of .*did you mean 'wikitext2'"):
        Calibration("wikitxt2")


def test_calibration_text_may_not_evaluate(documents, wikitext):
    path, _ = documents
    evaluation = {"c4": C4(path=str(path), seqlen=50).load(TOKENIZER)}
    same = Calibration(text="c4", path=str(path), samples=20, seqlen=50).load(TOKENIZER)
    other = Calibration(text="text", path=str(wikitext), samples=20, seqlen=50).load(TOKENIZER)
    for overlap in ("refuse", "warn"):
        with pytest.raises(UserError, match=r"the same text as data\.c4.*choose another text"):
            check_overlap(same, evaluation, overlap)
    elsewhere = replace(same, protocol=same.protocol | {"text_sha256": "of a part"})
    with pytest.raises(
        UserError, match=r"overlaps data\.c4: .*% of the runs of 50 tokens in a row.*calibration\.overlap"
    ):
        check_overlap(elsewhere, evaluation)
    check_overlap(other, evaluation)
    assert "calibration_overlap" not in evaluation["c4"].protocol


def test_shared_boilerplate_can_be_allowed_and_is_stamped(capsys):
    """Half of the evaluation's runs of 128 tokens are in the calibration windows: counted by hand."""
    row = torch.arange(2000)
    evaluation = {"text": Windows(row[:1000].reshape(1, -1), {"text_sha256": "a"})}
    calibration = Windows(row[None, 436:2000], {"text_sha256": "b"})
    shared, runs = 1000 - 436 - 127, 1000 - 127
    check_overlap(calibration, evaluation, "warn")
    assert evaluation["text"].protocol["calibration_overlap"] == pytest.approx(shared / runs)
    assert f"{shared / runs:.2%} of the runs of 128 tokens in a row are in both" in capsys.readouterr().out


def test_short_crops_at_any_offset_are_found(wikitext):
    """Crops that start between the evaluation windows' starts overlap all the same."""
    evaluation = Text(path=str(wikitext), seqlen=64).load(TOKENIZER)
    row = evaluation.tokens.reshape(-1)
    calibration = Windows(row[None, 37 : 37 + 64], {"text_sha256": "of a part"})
    with pytest.raises(UserError, match="64 tokens in a row"):
        check_overlap(calibration, {"text": evaluation})


def test_python_docs_calibrates_and_evaluates_side_by_side():
    evaluation = PythonDocs(windows=None, seqlen=256).load(TOKENIZER)
    calibration = Calibration(text="python_docs", samples=300, seqlen=256).load(TOKENIZER)
    check_overlap(calibration, {"python_docs": evaluation})
    assert "Python 3" in evaluation.protocol["source"]


@pytest.mark.parametrize("spare", [1, 3, 500])
def test_wikitext_calibrates_by_gptqs_crops(wikitext, spare):
    """As published: "\\n\\n".join(traindata["text"]), then randint(0, tokens - seqlen - 1) for each crop."""
    with wikitext.open() as stream:
        text = "\n\n".join(line if line.strip() else "" for line in stream)
    ids = TOKENIZER(text)["input_ids"]
    seqlen = len(ids) - spare
    windows = Calibration(text="wikitext2", path=str(wikitext), samples=12, seqlen=seqlen, seed=7).load(TOKENIZER)
    random.seed(7)
    starts = [random.randint(0, len(ids) - seqlen - 1) for _ in range(12)]
    assert windows.tokens.tolist() == [ids[start : start + seqlen] for start in starts]
    assert windows.protocol["text_sha256"] == fingerprint(text)


def test_fewer_windows_than_requested_are_announced(wikitext, capsys):
    windows = Wikitext2(path=str(wikitext), seqlen=100, windows=1000).load(TOKENIZER)
    count = windows.protocol["windows"]
    assert f"data.wikitext2.windows: the text has {count} windows of 100 tokens, not 1000." in capsys.readouterr().out


def test_the_stamp_says_how_documents_are_joined(documents, wikitext):
    load = {path: Text(path=str(path), seqlen=20).load(TOKENIZER).protocol["join"] for path in (documents[0], wikitext)}
    assert load == {documents[0]: "documents joined by \\n\\n", wikitext: "as it is"}


def test_another_column_holds_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": "some words " * 9, "text": number}) + "\n" for number in range(9)))
    for load in (Text(path=str(path), seqlen=20, column="body"), C4(path=str(path), seqlen=20, column="body")):
        assert load.load(TOKENIZER).tokens.shape[1] == 20
    calibration = Calibration(text="text", path=str(path), samples=2, seqlen=20, column="body")
    assert calibration.load(TOKENIZER).tokens.shape == (2, 20)
