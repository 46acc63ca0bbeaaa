"""Local text files: every format gives its text exactly, or one message that says why not."""

from __future__ import annotations

import bz2
import gzip
import json

import pandas as pd
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.data.text_files import read_documents
from haq_lab.utils.errors import UserError

ROWS = ["first row", "zweite Zeile, äöü", "ends in a newline\n", ""]
LINES = "".join(json.dumps({"text": row, "other": number}) + "\n" for number, row in enumerate(ROWS))


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=60))
def test_a_plain_file_is_read_character_for_character(text, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("plain"), "a.txt", text)
    assert read_documents(path, "x").texts == [text.removeprefix("\ufeff")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_line_ends_end_a_line(separator, tmp_path):
    text = f"one{separator}two\nthree\n"
    assert read_documents(write(tmp_path, "a.txt", text), "x").joined == text


def test_windows_line_ends_read_as_newlines(tmp_path):
    assert read_documents(write(tmp_path, "a.txt", "a\r\nb\rc\n"), "x").joined == "a\nb\nc\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(encoding, tmp_path):
    text = "naïve café\nzwei Straßen\n"
    assert read_documents(write(tmp_path, "a.txt", text.encode(encoding)), "x").joined == text


@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"abc\xe9def", 3), (bytes(range(256)), 128), (b"\xef\xbb\xbfab\xff", 5), (b"\xff\xfea\x00\x00\xd8", 4)],
)
def test_bytes_that_are_no_text_are_refused_with_their_offset(content, offset, tmp_path):
    with pytest.raises(UserError, match=rf"^x: '.*a\.txt' is not utf-\d+ text: byte {offset} cannot be decoded"):
        read_documents(write(tmp_path, "a.txt", content), "x")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps([{"text": row} for row in ROWS])),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("c4-train.00000-of-01024.json.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.zst", pyarrow.Codec("zstd").compress(LINES.encode(), asbytes=True)),
        ("rows [1] ü :: b.jsonl", LINES),
        ("a::b*.jsonl", LINES.encode("utf-16")),
    ],
)
def test_rows_of_json_are_documents(name, content, tmp_path):
    documents = read_documents(write(tmp_path, name, content), "x")
    assert documents.texts == ROWS
    assert documents.joined == "\n\n".join(ROWS), "whatever the first row ends in"
    assert documents.joining_rule == "documents joined by \\n\\n"


@pytest.mark.parametrize("name", ["wiki.test.raw", "NOTES.TXT", "a.text", "notes.txt.gz"])
def test_plain_files_by_any_name(name, tmp_path):
    content = b"one\ntwo\n"
    documents = read_documents(write(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content), "x")
    assert (documents.joined, documents.joining_rule) == ("one\ntwo\n", "as it is")


def test_parquet_and_another_column(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"body": ROWS, "text": [1, 2, 3, 4]}).to_parquet(path)
    assert read_documents(path, "x", "body").texts == ROWS
    with pytest.raises(UserError, match=r"has rows whose 'text' is not a text"):
        read_documents(path, "x")
    with pytest.raises(UserError, match=r"no field 'content' \(it has body, text\).*Set data\.text\.column to"):
        read_documents(path, "data.text.path", "content")


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name, content in (("b.txt", "two"), ("a/z.txt", "one"), ("c.md", "no text file"), ("d.jsonl", LINES)):
        write(tmp_path, f"folder/{name}", content)
    assert read_documents(tmp_path / "folder", "x").texts == ["one", "two", *ROWS]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^x: the folder '.*empty' has no text files"):
        read_documents(tmp_path / "empty", "x")


def test_other_columns_do_not_matter(tmp_path):
    rows = [{"text": "words", "meta": None if number < 900 else {"a": 1}} for number in range(1000)]
    path = write(tmp_path, "late.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_documents(path, "x").texts == ["words"] * 1000


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json"])
def test_an_empty_file_has_no_documents(name, tmp_path):
    assert read_documents(write(tmp_path, name, ""), "x").texts == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nx\n", r"the format of '.*a\.csv' is not supported"),
        ("a.jsonl", '{"txt": "x"}\n', r"no field 'text' \(it has txt\).*did you mean 'txt'"),
        ("b.jsonl", '{"text": "x"}\n{broken\n', "cannot be read as JSON: line 2"),
        ("c.jsonl", '{"text": "x"}\n\n{"text": null}\n', "row 3 of .* has a 'text' that is not a text"),
        ("d.jsonl", '"x"\n', "row 1 of .* is not a JSON object"),
        ("e.json", "[" * 100_000, "cannot be read as JSON"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.txt.gz", "no gzip", "cannot be read as txt"),
    ],
)
def test_an_unfit_file_says_why(name, content, message, tmp_path):
    with pytest.raises(UserError, match=rf"^calibration\.path: .*{message}"):
        read_documents(write(tmp_path, name, content), "calibration.path")


@given(content=st.binary(max_size=80), suffix=st.sampled_from([".txt", ".json", ".jsonl", ".parquet", ".txt.zst"]))
def test_any_bytes_give_texts_or_one_message(content, suffix, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("fuzz"), f"a{suffix}", content)
    try:
        texts = read_documents(path, "x").texts
    except UserError:
        return
    assert all(isinstance(text, str) for text in texts)
