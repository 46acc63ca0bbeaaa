"""Write tables of the page as LaTeX, with booktabs. The best values are bold, and differences follow the values."""

from __future__ import annotations

import re

from haq_lab.report.tables import Cell, Table

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL["±"] = r"\textpm{}"
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}  # other characters in TeX's own fonts
SPECIAL |= {letter: f"\\{letter}" for letter in "&%$#_{}"}


def latex(tables: list[Table]) -> str:
    """Return tables as LaTeX source, each in its own `table`. It needs the packages booktabs and graphicx."""
    return "\n".join([r"% \usepackage{booktabs,graphicx}", *map(_table, tables)])


def _table(table: Table) -> str:
    columns = "l" * (len(table.head) - table.numeric) + "r" * table.numeric
    rows = [" & ".join(map(_cell, row)) + r" \\" for row in table.rows]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(table.title)}. {escaped(table.note)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(escaped, table.head)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    text = rf"\textbf{{{escaped(cell.text)}}}" if cell.best else escaped(cell.text)
    return rf"{text} {{\scriptsize ({escaped(cell.note)})}}" if cell.note else text


def escaped(text: str) -> str:
    """Escape a text, so that LaTeX prints each of its characters."""
    return re.sub(r"[\\~^&%$#_{}<>|±]", lambda match: SPECIAL[match.group()], text)
