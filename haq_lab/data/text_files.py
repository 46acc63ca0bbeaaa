"""Read the documents of local text files: plain text, JSON, JSON lines and parquet, compressed or not.

A plain file is one document. Its text is read as it stands: only `\\n`, `\\r\\n` and `\\r` end a line, and all of them
read as `\\n`. A row of JSON or parquet is one document. Nothing is cached, so an edited file is never read stale.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from haq_lab.utils.errors import UserError, nearest, nearest_beside

PLAIN = (".txt", ".text", ".raw")
FORMATS = (*PLAIN, ".jsonl", ".json", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}


@dataclass(frozen=True)
class Documents:
    """The documents of one path.

    Attributes:
        texts: One text a document.
        plain: Whether all of them are plain files. Then a document is a whole file.
    """

    texts: list[str]
    plain: bool

    @property
    def joined(self) -> str:
        """All documents as one text, with a blank line between two documents."""
        return "\n\n".join(self.texts)

    @property
    def joining_rule(self) -> str:
        """How `joined` joins documents, for the protocol stamp."""
        return "as it is" if self.plain and len(self.texts) == 1 else "documents joined by \\n\\n"


def read_documents(path: str | Path, setting: str, column: str = "text") -> Documents:
    """Read all documents of a file, or of all text files below a folder in the order of their names.

    Args:
        path: File or folder. The suffix says the format: .txt, .text, .raw, .jsonl, .json or .parquet, in any case,
            and .gz, .zst, .bz2 or .lz4 behind it if the file is compressed.
        setting: Name of the setting that holds `path`, for error messages.
        column: Field of JSON or parquet that holds the text. Other fields are not read.

    Raises:
        UserError: The path does not exist, has another format, cannot be decoded, or lacks the column.

    Example:
        >>> read_documents("corpus.jsonl.zst", "data.text.path").joined  # doctest: +SKIP
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{setting}: there is no file '{place}'{nearest_beside(place)}")
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file() and _suffixes(file)[0] in FORMATS)
        if not files:
            raise UserError(f"{setting}: the folder '{place}' has no text files. Supported: {', '.join(FORMATS)}.")
    else:
        files = [place]
    texts = [text for file in files for text in _documents(file, setting, column)]
    return Documents(texts, plain=all(_suffixes(file)[0] in PLAIN for file in files))


def _suffixes(file: Path) -> tuple[str, str]:
    """A file's format and compression by its name, in lower case; the compression may be empty."""
    last = file.suffix.lower()
    return (Path(file.stem).suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def _documents(file: Path, setting: str, column: str) -> Iterator[str]:
    kind, compression = _suffixes(file)
    if kind not in FORMATS:
        raise UserError(
            f"{setting}: the format of '{file}' is not supported. Supported: {', '.join(FORMATS)}, "
            f"also with {', '.join(COMPRESSIONS)}."
        )
    try:
        with pyarrow.OSFile(str(file)) as raw:
            stream: Any = pyarrow.CompressedInputStream(raw, COMPRESSIONS[compression]) if compression else raw
            if kind in PLAIN:
                yield _decode(stream.read(), file, setting)
            elif kind == ".parquet":
                yield from _parquet_rows(stream.read() if compression else file, file, setting, column)
            else:
                yield from _json_rows(_decode(stream.read(), file, setting), file, setting, column)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{setting}: '{file}' cannot be read as {kind[1:]} ({error}).") from error


def _decode(content: bytes, file: Path, setting: str) -> str:
    """Text of UTF-8, or of UTF-16 or UTF-32 with a byte order mark. Line ends become `\\n`."""
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        offset = error.start + (len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0)
        raise UserError(
            f"{setting}: '{file}' is not {encoding.removesuffix('-sig')} text: byte {offset} cannot be decoded. "
            "Convert the file to UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_rows(text: str, file: Path, setting: str, column: str) -> Iterator[str]:
    """Rows of JSON lines, or of one array of objects."""
    if text.lstrip().startswith("["):
        rows: Iterator[tuple[int, Any]] = enumerate(_parsed(text, file, setting, 1), 1)
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = ((number, _parsed(line, file, setting, number)) for number, line in lines)
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{setting}: row {number} of '{file}' is not a JSON object.")
        if column not in row:
            raise _no_column(row, file, setting, column)
        if not isinstance(row[column], str):
            raise UserError(f"{setting}: row {number} of '{file}' has a '{column}' that is not a text.")
        yield row[column]


def _parsed(text: str, file: Path, setting: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{setting}: '{file}' cannot be read as JSON: line {line} ({error}).") from error


def _parquet_rows(source: Path | bytes, file: Path, setting: str, column: str) -> Iterator[str]:
    stream: BinaryIO | str = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    with pyarrow.parquet.ParquetFile(stream) as table:
        if column not in table.schema_arrow.names:
            raise _no_column(table.schema_arrow.names, file, setting, column)
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise UserError(f"{setting}: '{file}' has rows whose '{column}' is not a text.")
                yield text


def _no_column(names: Any, file: Path, setting: str, column: str) -> UserError:
    fields = ", ".join(map(str, names))
    hint = f" Set {setting.removesuffix('path')}column to the field that holds the text." if names else ""
    return UserError(f"{setting}: '{file}' has no field '{column}' (it has {fields}){nearest(column, names)}.{hint}")
