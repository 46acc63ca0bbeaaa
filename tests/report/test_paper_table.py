r"""LaTeX tables as in a paper: what is where, what is bold, and that every name is escaped."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.report.collect import Collection, collect
from haq_lab.report.latex import SPECIAL, escaped
from haq_lab.report.paper_table import latex
from haq_lab.utils.errors import UserError

HOSTILE = r"50% of a_b & c\d~^{x} <|y|> $z$ #1 ``q'' --x [2] *é模→"
DOCUMENT = r"\documentclass{article}\usepackage{booktabs,graphicx,siunitx}\begin{document}%s\end{document}"


def cells(source: str) -> list[list[str]]:
    """The cells of each row, without commands of whole rows."""
    rows = re.findall(r"^(.*?) \\\\", source, flags=re.MULTILINE)
    return [re.split(r"(?<!\\) & ", row) for row in rows]


def widths(row: list[str]) -> int:
    """How many columns the cells of a row fill."""
    spans = (re.match(r"\\multicolumn\{(\d+)\}", cell) for cell in row)
    return sum(int(span[1]) if span else 1 for span in spans)


@pytest.fixture
def found(write_sweep) -> Collection:
    return collect(write_sweep())


def test_methods_are_rows_and_schemes_are_columns_if_they_fit(found):
    source = latex(found, ["perplexity"], "one")
    rows = cells(source)
    assert [row[0] for row in rows] == ["", "", "method", "full precision", "RTN", "SmoothQuant", "GPTQ", "HAQ"]
    assert rows[0][1:] == [r"\multicolumn{2}{c}{WikiText-2}", r"\multicolumn{2}{c}{C4}"]
    assert rows[2][1:] == ["{per token}", "{static}"] * 2
    assert rows[3][1:] == [r"\multicolumn{2}{c}{22.50}"] * 2  # once, not once for each scheme
    assert rows[4][1:] == ["23.21", "41.00"] * 2
    assert {widths(row) for row in rows} == {5}
    assert len(re.findall(r"S\[table-format=2\.2", source)) == 4


def test_otherwise_schemes_are_parts_of_the_rows(found):
    rows = cells(latex(found, ["perplexity", "change", "kl"], "one"))
    names = [re.sub(r"\\multicolumn.*\\emph\{(.*)\}\}", r"\1", row[0]) for row in rows]
    methods = ["RTN", "SmoothQuant", "GPTQ", "HAQ"]
    assert names == ["", "method", "full precision", "per token", *methods, "static", *methods]
    assert {widths(row) for row in rows} == {7}
    haq = rows[7]
    assert haq[1:4] == [r"\bfseries 22.55", r"\bfseries +0.20(0)".replace("(0)", ""), r"\bfseries 0.0020"]


def test_the_columns_are_chosen_and_keep_their_order(found):
    source = latex(found, ["kl", "memory.weights_bytes"], "two")
    assert r"\begin{table*}" in source
    assert cells(source)[1][1:] == [r"\multicolumn{2}{c}{KL, nats $\downarrow$}"] * 2 + [
        r"\multicolumn{2}{c}{weights, MB $\downarrow$}"
    ]
    with pytest.raises(UserError, match=r"--latex-columns: 'perplexty' is not one of .*did you mean 'perplexity'"):
        latex(found, ["perplexty"])
    with pytest.raises(UserError, match="--latex-width: '3' is not one of one, two"):
        latex(found, ["kl"], "3")


def test_full_precision_comes_from_the_quantised_runs_if_it_has_no_run(write_sweep):
    sweep = write_sweep()
    for folder in sweep.glob("quantizer=none*"):
        shutil.rmtree(folder)
    assert cells(latex(collect(sweep), ["perplexity"]))[3][:2] == ["full precision", r"\multicolumn{2}{c}{22.50}"]


def test_escaping_by_hand():
    assert escaped(r"50% of a_b & c\d~") == r"50\% of a\_b \& c\textbackslash{}d\textasciitilde{}"
    assert escaped("<|x|> ±") == r"\textless{}\textbar{}x\textbar{}\textgreater{} \textpm{}"
    assert escaped("é ç ß 模\n\tx") == r"\'{e} \c{c} \ss{} (U+6A21) x"
    assert escaped("--x [2] *") == r"-{}-x {[}2{]} {*}"


@given(st.text())
def test_escaped_text_has_no_character_with_a_meaning_to_tex(text):
    source = escaped(text)
    assert source.isascii()
    assert source.isprintable()
    for command in sorted({*SPECIAL.values()}, key=len, reverse=True):
        source = source.replace(command, "")
    assert not re.search(r"(?<!\\)[&%$#_^~]", re.sub(r"\\[`'^\"~rcvu=.]\{[A-Za-z]\}", "", source))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("width", ["one", "two"])
def test_it_compiles_whatever_the_names_are(write_sweep, width, tmp_path: Path):
    found = collect(write_sweep(HOSTILE, ("wikitext2", HOSTILE)))
    for columns in (["perplexity"], ["perplexity", "change", "kl", "token_agreement", "memory.weights_bytes"]):
        (tmp_path / "paper.tex").write_text(DOCUMENT % latex(found, columns, width))
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
