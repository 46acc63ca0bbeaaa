"""Lay out results as in a paper: methods are rows, texts and metrics are columns. Schemes are columns if they fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pandas as pd

from haq_lab.measure.metrics import Metric, find_metric
from haq_lab.report.collect import Collection
from haq_lab.report.latex import PREAMBLE, environment, escaped, plain_table, require_width
from haq_lab.report.tables import comparable_groups, measured_metrics, published_table, shared_full_precision
from haq_lab.report.verdicts import best_runs
from haq_lab.results.run_labels import FULL_PRECISION
from haq_lab.utils.errors import invalid

FITTING = {"one": 4, "two": 8}  # columns with numbers that fit one or two columns of a page
KINDS = {  # columns that there are for each text; a paper prints fewer digits than the page
    "perplexity": Metric("perplexity", "", "lower", 2),
    "change": Metric("over fp", "%", "lower", 2),
    "kl": Metric("KL", "nats", "lower", 4),
    "token_agreement": Metric("agreement", "%", "higher", 2, 100),
}
RECORDED = {"change": "change_percent"}  # names in the table of runs, where they are others
DEFAULT = ("perplexity", "kl")
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "c4_new": "C4 (new)", "python_docs": "Python docs"}
ARROWS = {"lower": r" $\downarrow$", "higher": r" $\uparrow$", "": ""}


class Column(NamedTuple):
    """One column of numbers. With schemes as columns, there is one for each scheme.

    Attributes:
        text: Name of the text. Empty for metrics such as latency.
        name: Name in the table of runs, such as `perplexity.c4`.
        metric: How it is shown.
    """

    text: str
    name: str
    metric: Metric


def latex(collection: Collection, columns: Sequence[str] = DEFAULT, width: str = "one") -> str:
    """Return one table for each model and set of windows, and one of published figures, as LaTeX source.

    Args:
        collection: All data of the report.
        columns: Metrics in the order of the columns: `perplexity`, `change`, `kl`, `token_agreement`, or the full name
            of another metric, such as `memory.weights_bytes`.
        width: Columns of the page that a table spans: `one` or `two`.

    Raises:
        UserError: No run has one of the columns, or the width is not known.
    """
    require_width(width)
    groups = comparable_groups(collection)
    others = {name for _, runs in groups for name in measured_metrics(runs, collection.metrics)}
    allowed = [*KINDS, *sorted(name for name in others if name.partition(".")[0] not in KINDS)]
    for name in columns:
        if name not in allowed:
            raise invalid("--latex-columns", name, allowed)
    tables = [PREAMBLE]
    for number, (title, runs) in enumerate(groups, start=1):
        if found := _columns(runs, columns, collection):
            tables.append(_table(runs, found, title, f"results-{number}", width))
    if (published := published_table(collection)) is not None:
        tables.append(plain_table(published, "published", width))
    return "\n".join(tables)


def _columns(runs: pd.DataFrame, chosen: Sequence[str], collection: Collection) -> list[Column]:
    """Return the chosen columns that the runs have: those of each text, then the others."""
    texts = [name.partition(".")[2] for name in measured_metrics(runs, {}) if name.startswith("perplexity.")]
    found = [
        Column(text, f"{RECORDED.get(kind, kind)}.{text}", KINDS[kind])
        for text in texts
        for kind in chosen
        if kind in KINDS
    ]
    for name in chosen:
        if name not in KINDS and (metric := find_metric(name, collection.metrics)) is not None:
            found.append(Column("", name, metric))
    return [column for column in found if column.name in runs and runs[column.name].notna().any()]


def _table(runs: pd.DataFrame, columns: list[Column], title: str, label: str, width: str) -> str:
    quantised = runs[runs["quantized"]]
    schemes = list(dict.fromkeys(quantised["scheme"]))
    across = "" not in schemes and 1 < len(schemes) * len(columns) <= FITTING[width] and len(schemes) > 1
    best = {
        (scheme, column.name): best_runs(quantised[quantised["scheme"] == scheme], column.name, column.metric)
        for scheme in schemes
        for column in columns
    }
    cells = {
        (part, row, column.name): _number(run, column, str(run["name"]) in best[part, column.name])
        for (part, row), run in _keyed(quantised)
        for column in columns
    }
    rows = list(dict.fromkeys(row for _, row, _ in cells))
    spread = len(schemes) if across else 1
    lines = [*_head(columns, schemes if across else []), r"\midrule"]
    full = _full_precision(runs, columns)
    lines += [_line(name, [_across(value, spread) for value in values]) for name, values in full]
    if across:
        lines += [r"\midrule"] * bool(full and rows)
        for row in rows:
            values = [cells.get((scheme, row, column.name), "{--}") for column in columns for scheme in schemes]
            lines.append(_line(row, values))
    else:
        for number, scheme in enumerate(schemes):
            lines += [r"\midrule"] * bool(number or full)
            if len(schemes) > 1 and scheme:
                lines.append(rf"\multicolumn{{{len(columns) + 1}}}{{@{{}}l}}{{\emph{{{escaped(scheme)}}}}} \\")
            for row in rows:
                own = [cells.get((scheme, row, column.name)) for column in columns]
                if any(own):
                    lines.append(_line(row, [value or "{--}" for value in own]))
    kinds = [
        _siunitx([cells.get((scheme, row, column.name), "") for scheme in group for row in rows])
        for column in columns
        for group in ([[one] for one in schemes] if across else [schemes])
    ]
    caption = (
        f"{escaped(title)}{_only_scheme(schemes)}. Bold: the best of each scheme, with those equal to it within noise."
    )
    if any("(" in cell for cell in cells.values()):
        caption += " In brackets: standard error of the last digits."
    return environment("l" + "".join(kinds), lines, caption, label, width)


def _keyed(runs: pd.DataFrame) -> list[tuple[tuple[str, str], pd.Series]]:
    """Return the runs, each with its scheme and the name of its row. Runs of one name are numbered."""
    names = [", ".join(filter(None, parts)) for parts in zip(runs["method"], runs["variant"], strict=True)]
    again = pd.Series(names, index=runs.index).groupby([runs["scheme"], pd.Series(names, index=runs.index)]).cumcount()
    rows = [f"{name} ({count + 1})" if count else name for name, count in zip(names, again, strict=True)]
    return [((str(run["scheme"]), row), run) for row, (_, run) in zip(rows, runs.iterrows(), strict=True)]


def _number(run: pd.Series, column: Column, best: bool) -> str:
    """Return a value for siunitx, with its standard error in units of the last digit."""
    value = run[column.name]
    if pd.isna(value) or not np.isfinite(value):
        return "{null}" if isinstance(run.get(f"null.{column.name}"), str) else "{--}"
    kind, metric = column.name.partition(".")[0], column.metric
    text = _digits(metric, value)
    if kind == "change_percent":
        text, error = f"{value:+.{metric.decimals}f}", run.get(f"change_percent_stderr.{column.text}")
    else:
        error = run.get(f"{column.name}.stderr") if kind == "kl" else None
    if error is not None and np.isfinite(error) and metric.decimals is not None:
        last = round(error * metric.factor * 10**metric.decimals)
        text += f"({last})" if last else ""
    return rf"\bfseries {text}" if best else text


def _digits(metric: Metric, value: float) -> str:
    """Return a value in the metric's unit, in a form that siunitx reads."""
    return metric.format(value).replace(",", "")


def _full_precision(runs: pd.DataFrame, columns: list[Column]) -> list[tuple[str, list[str]]]:
    """Return name and values of the rows of full precision: its own runs, or what the quantised runs measured."""
    rows = []
    for _, run in runs[~runs["quantized"]].iterrows():
        known = [one.name for one in columns if not one.text or one.metric == KINDS["perplexity"]]  # KL would be 0
        values = [
            _digits(one.metric, run[one.name]) if one.name in known and pd.notna(run[one.name]) else ""
            for one in columns
        ]
        rows.append((", ".join(filter(None, (FULL_PRECISION, run["variant"]))), values))
    if not rows:
        values = []
        for column in columns:
            shared = shared_full_precision(runs, column.text) if column.metric == KINDS["perplexity"] else None
            values.append("" if shared is None else _digits(column.metric, shared))
        rows = [(FULL_PRECISION, values)] if any(values) else []
    return rows


def _head(columns: list[Column], schemes: list[str]) -> list[str]:
    """Return the lines of the head: texts, metrics, and schemes if they are columns."""
    spread = max(1, len(schemes))
    lines = []
    if any(column.text for column in columns):
        cells, rules, place = [], [], 2
        for text, own in groupby(columns, key=lambda column: column.text):
            count = spread * len(list(own))
            cells.append(_across(escaped(TEXTS.get(text, text)), count, number=False))
            rules += [rf"\cmidrule(lr){{{place}-{place + count - 1}}}"] * bool(text and count > 1)
            place += count
        lines.append(_line("", cells) + "".join(rules))
    heads = [escaped(column.metric.head) + ARROWS[column.metric.direction] for column in columns]
    lines.append(_line("" if schemes else "method", [_across(head, spread, number=False) for head in heads]))
    if schemes:
        rules = [rf"\cmidrule(lr){{{2 + spread * place}-{1 + spread * (place + 1)}}}" for place in range(len(columns))]
        lines[-1] += "".join(rules)
        lines.append(_line("method", [f"{{{escaped(scheme)}}}" for _ in columns for scheme in schemes]))
    return lines


def _across(text: str, count: int, number: bool = True) -> str:
    """Return a cell across several columns. A number in one column is aligned with the others."""
    if count == 1:
        return (text or "{}") if number and text else f"{{{text}}}"
    return rf"\multicolumn{{{count}}}{{c}}{{{text}}}"


def _line(name: str, cells: list[str]) -> str:
    return " & ".join([name if name == "" else escaped(name), *cells]) + r" \\"


def _only_scheme(schemes: list[str]) -> str:
    return f", activation scales {escaped(schemes[0])}" if len(schemes) == 1 and schemes[0] else ""


def _siunitx(cells: list[str]) -> str:
    """Return the type of a column: room for the sign, the digits and the errors of its values."""
    numbers = [match for cell in cells if (match := re.search(r"([+-]?)(\d+)(?:\.(\d+))?(?:\((\d+)\))?$", cell))]
    if not numbers:
        return "c"
    sign = "+" if any(number[1] for number in numbers) else ""
    whole, decimals, error = (max(len(number[part] or "") for number in numbers) for part in (2, 3, 4))
    options = "detect-weight" + ",retain-explicit-plus" * bool(sign)
    return rf"S[table-format={sign}{whole}.{decimals}{f'({error})' if error else ''},{options}]"
