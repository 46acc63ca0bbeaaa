"""Write tables as LaTeX, with booktabs. They compile with pdflatex, whatever characters the names have.

The layout of the result tables is in `haq_lab.report.paper_table`.
"""

from __future__ import annotations

import re
import unicodedata

from haq_lab.report.tables import Table
from haq_lab.utils.errors import invalid

PREAMBLE = r"% \usepackage{booktabs,graphicx,siunitx}"
WIDTHS = {"one": "table", "two": "table*"}  # columns of the page that a table spans, and its environment
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"\textpm{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}  # other characters in TeX's own fonts
SPECIAL |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
SPECIAL |= {letter: f"{{{letter}}}" for letter in "[]*"}  # after `\\`, these would be its arguments
SPECIAL |= {'"': "''{}"}  # active with some languages of babel
SPECIAL |= {
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "µ": r"$\mu$",
    "μ": r"$\mu$",
    "\N{EN DASH}": "--",
    "—": "---",
    "→": r"$\to$",
    "≤": r"$\le$",
}
SPECIAL |= {"≥": r"$\ge$", "…": r"\dots{}", "\N{NO-BREAK SPACE}": "~", "ß": r"\ss{}"}
LIGATURES = re.compile(r"(?<=[-'`,!?])(?=[-'`,])")  # between characters that TeX would join
ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"', "\u030a": "r", "\u0327": "c"}
ACCENTS |= {"\u030c": "v", "\u0304": "=", "\u0306": "u", "\u0307": "."}


def require_width(width: str) -> None:
    """Check the number of columns of the page that tables span.

    Raises:
        UserError: It is neither `one` nor `two`.
    """
    if width not in WIDTHS:
        raise invalid("--latex-width", width, WIDTHS)


def escaped(text: str) -> str:
    """Escape a text, so that LaTeX prints each of its characters.

    Characters that pdflatex's fonts do not have become their code points, such as `(U+6A21)`.
    """
    pieces = LIGATURES.split(" ".join(text.split()))
    return "{}".join("".join(map(_escaped_character, piece)) for piece in pieces)


def _escaped_character(letter: str) -> str:
    if letter in SPECIAL:
        return SPECIAL[letter]
    if " " <= letter <= "~":
        return letter
    parts = unicodedata.normalize("NFD", letter)
    if len(parts) == 2 and parts[1] in ACCENTS and re.fullmatch("[A-Za-z]", parts[0]):
        return rf"\{ACCENTS[parts[1]]}{{{parts[0]}}}"
    return f"(U+{ord(letter):04X})"


def environment(columns: str, lines: list[str], caption: str, label: str, width: str) -> str:
    """Return a whole table. It is made smaller if it is wider than its part of the page.

    Args:
        columns: Types of the columns, as `tabular` takes them.
        lines: Source between the top and the bottom rule.
        caption: Source of the caption.
        label: Name for `\\ref`.
        width: `one` or `two` columns of the page.
    """
    name = WIDTHS[width]
    parts = [
        rf"\begin{{{name}}}[t]",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{label}}}",
        r"\sbox0{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}}%",
        r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
        rf"\end{{{name}}}",
    ]
    return "\n".join(parts) + "\n"


def plain_table(table: Table, label: str, width: str) -> str:
    """Return a table of the page with its own columns.

    Args:
        table: The table.
        label: Name for `\\ref`.
        width: `one` or `two` columns of the page.
    """
    columns = "l" * (len(table.head) - table.numeric) + "r" * table.numeric
    head = " & ".join(map(escaped, table.head)) + r" \\"
    rows = [" & ".join(escaped(cell.text) for cell in row) + r" \\" for row in table.rows]
    caption = escaped(f"{table.title}. {table.note}")
    return environment(columns, [head, r"\midrule", *rows], caption, label, width)
