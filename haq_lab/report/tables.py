"""Make the tables of results: quality with the best values marked, cost, and published figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from haq_lab.measure.disturbance import MARK, disturbances, mark
from haq_lab.measure.metrics import UNQUANTISED, Metric, find_metric, table_columns
from haq_lab.report.collect import Collection
from haq_lab.report.verdicts import best_runs, verdict
from haq_lab.results.load import RANDOM_PROMPTS, evaluated_texts
from haq_lab.results.published import beside, figures_of
from haq_lab.results.run_labels import FULL_PRECISION
from haq_lab.utils.console import format_change

WIDEST = 8  # columns with numbers, so that a table fits a screen of 1,280 pixels
WIDEST_QUALITY = 6  # the same of quality, whose heads are longer: three columns for each of two texts
PARTS = {  # tables of a model besides the first one, by the beginning of their metrics' names
    "cost": ("memory.", "latency.", "quantizer."),
    "offloading": ("offload.",),
}
NOTE = (
    "Marked: the best of the quantised runs, with those that are equal within noise or as printed. ±: standard error "
    "over the windows. Differences in %: perplexity from the full precision of the same run, weights from the whole "
    "model in fp16, latency and task scores from the table's unquantised run if it has exactly one. RAM to run is the "
    "peak while the model reads a prompt and decodes, beyond Python and the libraries. x fp32: speed over that of the "
    "unquantised model, whose tokens alternate with the run's."
)


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: Content of the cell.
        best: Whether it is the best value of its column.
        note: Text behind it, such as a difference.
    """

    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        title: Title of the table.
        head: Names of the columns.
        rows: Cells of each row.
        numeric: Number of columns with numbers. They are the last ones.
        note: Sentences below the table.
    """

    title: str
    head: list[str]
    rows: list[list[Cell]]
    numeric: int = 0
    note: str = ""


def comparable_groups(collection: Collection) -> list[tuple[str, pd.DataFrame]]:
    """Return the runs of each model and set of evaluation windows, with a title. The runs of a group are comparable."""
    groups: dict[tuple[str, tuple[Any, ...]], list[pd.Series]] = {}
    for _, run in collection.shown.iterrows():
        protocol = collection.protocol[run["name"]]
        windows = tuple((text, frozen_stamp(protocol[text])) for text in evaluated_texts(protocol))
        groups.setdefault((str(run["model"]), windows), []).append(run)
    titled = []
    for (model, windows), runs in groups.items():
        evaluated = [other for of, other in groups if of == model and other]
        title = model
        if windows and len(evaluated) > 1:
            title += f", windows {evaluated.index(windows) + 1}"
        elif evaluated and not windows:
            title += ", not evaluated on text"
        titled.append((title, pd.DataFrame(runs)))
    return titled


def result_tables(collection: Collection) -> list[Table]:
    """Return the tables of each group of comparable runs: quality, then cost and offloading if they do not fit too."""
    groups = comparable_groups(collection)
    return [table for title, runs in groups for table in _result_tables(runs, title, collection.metrics)]


def _result_tables(runs: pd.DataFrame, title: str, declared: dict[str, Metric]) -> list[Table]:
    measured = measured_metrics(runs, declared)
    baseline, contenders = runs[~runs["quantized"]], runs[runs["quantized"]]
    best = {name: best_runs(contenders, name, metric) for name, metric in measured.items()}
    best |= {name: set() for name in measured if any(mark(name, run) for _, run in runs.iterrows())}
    tables = []
    for part, names in _parts(list(measured)):
        rows = [] if len(baseline) else _full_precision(contenders, names)
        for _, run in runs.iterrows():
            prompts = run.get("prompts") == RANDOM_PROMPTS and any(
                name.startswith(("latency.", "offload.")) for name in names
            )
            cells = [_cell(name, measured[name], run, baseline, best[name]) for name in names]
            if any(cell.text for cell in cells) or not names:
                rows.append([Cell(run["label"], note="random prompts" if prompts else ""), *cells])
        head = ["run", *(measured[name].head for name in names)]
        note = _verdicts(contenders, names, best)
        tables.append(Table(f"{title}: {part}" if part else title, head, rows, len(names), note))
    note = " ".join(filter(None, [tables[-1].note, *_busy_machines(runs), *_limitations(runs)]))
    return [*tables[:-1], replace(tables[-1], note=note)]


def measured_metrics(runs: pd.DataFrame, declared: dict[str, Metric]) -> dict[str, Metric]:
    """Return the metrics that at least one of the runs has, or that are null for a reason, in the order of tables."""
    names = [str(name) for name in runs if runs[name].notna().any() or f"null.{name}" in runs]
    return table_columns(names, declared)


def _parts(names: list[str]) -> list[tuple[str, list[str]]]:
    """Return the metrics of each table of a model: all in one if they fit, otherwise quality, cost and offloading."""
    if len(names) <= WIDEST_QUALITY:
        return [("", names)]
    parts: dict[str, list[str]] = {"": []}
    for name in names:
        part = next((part for part, begins in PARTS.items() if name.startswith(begins)), "")
        parts.setdefault(part, []).append(name)
    return [
        (f"{part} ({number})".strip() if number > 1 else part, names[start : start + width])
        for part, names in parts.items()
        for width in [_width(len(names), WIDEST if part else WIDEST_QUALITY)]
        for number, start in enumerate(range(0, len(names), width), start=1)
    ]


def _width(columns: int, widest: int) -> int:
    """Return how many columns each of several tables has, so that they are about equally wide."""
    tables = max(1, -(-columns // widest))
    return max(1, -(-columns // tables))


def _full_precision(runs: pd.DataFrame, names: list[str]) -> list[list[Cell]]:
    """Return a row of the perplexities in full precision that all runs share. None if there are none."""
    cells = []
    for name in names:
        kind, _, text = name.partition(".")
        metric, shared = find_metric(name), shared_full_precision(runs, text)
        shown = "" if kind != "perplexity" or metric is None or shared is None else metric.format(shared)
        cells.append(Cell(shown))
    return [[Cell(FULL_PRECISION), *cells]] if any(cell.text for cell in cells) else []


def shared_full_precision(runs: pd.DataFrame, text: str) -> float | None:
    """Return the perplexity in full precision of a text. None if the runs do not share it."""
    values = set(runs.get(f"perplexity_fp.{text}", pd.Series(dtype=float)).dropna())
    return values.pop() if len(values) == 1 else None


def _cell(name: str, metric: Metric, run: pd.Series, baseline: pd.DataFrame, best: set[str]) -> Cell:
    if pd.notna(value := run[name]):
        shown = mark(name, run) + metric.format(value)
        return Cell(shown, run["name"] in best, _difference(name, metric, run, baseline))
    reason = run.get(f"null.{name}")  # a metric that the run did not measure has none
    return Cell("null", note=reason) if isinstance(reason, str) else Cell("")


def _verdicts(contenders: pd.DataFrame, names: list[str], best: dict[str, set[str]]) -> str:
    """Return a sentence for each text whose KL divergence is in a table."""
    labels = contenders.set_index("name")["label"]
    sentences = []
    for name in names:
        if name.startswith("kl."):
            winners = {labels[winner] for winner in best[name]}
            sentences.append(verdict(name.partition(".")[2], int(contenders[name].notna().sum()), winners))
    return " ".join(filter(None, sentences))


def _limitations(runs: pd.DataFrame) -> list[str]:
    """Return a sentence for each run in which a part of the offloading method is off."""
    if "offload_limitation" not in runs:
        return []
    limited = runs[runs["offload_limitation"].notna()]
    return [f"{run['label']}: {run['offload_limitation'].rstrip('.')}." for _, run in limited.iterrows()]


def _busy_machines(runs: pd.DataFrame) -> list[str]:
    """Return a sentence for each run whose latency other work disturbed."""
    disturbed = [(run, reasons) for _, run in runs.iterrows() if (reasons := disturbances(run))]
    sentences = [f"{run['label']}: {', and '.join(reasons)}." for run, reasons in disturbed]
    return [f"{MARK}: the machine was busy when latency was measured.", *sentences] if sentences else []


def _difference(name: str, metric: Metric, run: pd.Series, unquantised: pd.DataFrame) -> str:
    """Return the difference from the metric's baseline in %, with its standard error if it is known.

    Without exactly one baseline, return the standard error of the value itself, or an empty string.
    """
    if metric.baseline == "" and pd.notna(error := run.get(f"{name}.stderr")):
        return f"± {metric.format(error)}"
    if metric.baseline == UNQUANTISED:
        reference = unquantised[name].iloc[0] if len(unquantised) == 1 else None
    else:
        reference = run.get(metric.baseline)
    if reference is None or pd.isna(reference) or not reference or run[name] == reference:
        return ""
    paired = run.get(f"dlnppl.{name.partition('.')[2]}.stderr") if name.startswith("perplexity.") else None
    return format_change(run[name], reference, paired)


def published_table(collection: Collection) -> Table | None:
    """Return a table of published figures beside ours. None if there are no published figures for the runs."""
    table = beside(collection.shown)
    if table.empty:
        return None
    rows = []
    for _, row in table.iterrows():
        metric = find_metric(row["metric"])
        by = ", ".join(filter(None, (row["of"], row["source"])))
        texts = [row["run"], row["metric"] if metric is None else metric.head, by, row["comparable"]]
        rows.append(list(map(Cell, [*texts, *figures_of(row)])))
    head = ["run", "metric", "published for, by", "comparable", "ours", "published", "difference"]
    note = "An empty cell means that no published figure is known. Figures that are not comparable are for orientation."
    return Table("Published figures beside ours", head, rows, 3, note)


def frozen_stamp(stamp: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return a protocol stamp in a form that can be compared and hashed."""
    return tuple(sorted((name, str(value)) for name, value in stamp.items()))
