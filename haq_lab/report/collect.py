"""Read everything that the report shows: runs and their tables, replays (`hit_rates.csv`) and plans (`plan.csv`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError

from haq_lab.calibration.channel_ranges import FILE, Ranges
from haq_lab.measure.metrics import Metric
from haq_lab.results import load as results
from haq_lab.results.old_names import LAYER_COLUMNS
from haq_lab.results.read_record import read_record
from haq_lab.results.run_labels import FULL_PRECISION, with_labels
from haq_lab.tracking.run_folder import ARCHIVE
from haq_lab.utils.console import errors, say

TABLES = ("layers", "experts", "latency")  # tables of runs (`<name>.csv`) from which charts are drawn
STUDIES = ("hit_rates", "plan")  # tables of `python -m haq_lab.offload replay` and `plan`


@dataclass
class Collection:
    """All data of a report.

    Attributes:
        runs: Table of runs from `haq_lab.results.load` with the columns of `haq_lab.results.run_labels`, and
            `repeated`: whether an earlier run measured the same full-precision model. Names are unique.
        tables: Tables of the finished runs by name (`TABLES`). The column `run` has the name of the run.
        ranges: Ranges of the inputs' channels, by run.
        studies: Tables of replays and plans by name (`STUDIES`). The column `study` has the name of the folder.
        protocol: Protocol of each run: a stamp for each text.
        metrics: Metrics that the users' own measures declare, by name or pattern.
    """

    runs: pd.DataFrame
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    ranges: dict[str, Ranges] = field(default_factory=dict)
    studies: dict[str, pd.DataFrame] = field(default_factory=dict)
    protocol: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)

    def by_model(self) -> list[tuple[str, pd.DataFrame]]:
        """Return the runs of each model that are shown. Their column `label` is the name without the model."""
        return [(str(model), runs) for model, runs in self.shown.groupby("model", sort=False)]

    def by_study(self, kind: str) -> list[tuple[str, pd.DataFrame]]:
        """Return the table of each study of a kind (one of `STUDIES`)."""
        if kind not in self.studies:
            return []
        return [(str(study), table) for study, table in self.studies[kind].groupby("study", sort=False)]

    @property
    def finished(self) -> pd.DataFrame:
        """The finished runs."""
        return self.runs[self.runs["status"] == "finished"]

    @property
    def shown(self) -> pd.DataFrame:
        """The finished runs of results and figures: full precision once, not once for each scheme of a sweep."""
        return self.finished[~self.finished["repeated"]]


def collect(*folders: str | Path) -> Collection:
    """Read all runs, replays and plans below some folders.

    Args:
        folders: Folders of runs, sweeps or studies.

    Raises:
        UserError: A folder does not exist.
    """
    runs = results.load(*folders)
    collection = Collection(_named(runs), metrics=runs.attrs["own_metrics"])
    stacks: dict[str, list[pd.DataFrame]] = {}
    for _, run in collection.finished.iterrows():
        folder, name = Path(run["folder"]), str(run["name"])
        record = read_record(folder / "results.json") or {}
        collection.protocol[name] = record.get("protocol", {})
        for kind in TABLES:
            if (table := _table(folder / f"{kind}.csv")) is not None:
                stacks.setdefault(kind, []).append(table.assign(run=name))
        if (ranges := _ranges(folder / FILE)) is not None:
            collection.ranges[name] = ranges
    collection.runs["repeated"] = _repeated(collection.runs, collection.protocol)
    collection.tables = {kind: pd.concat(stack, ignore_index=True) for kind, stack in stacks.items()}
    for kind in STUDIES:
        stack = [
            table.assign(study=path.parent.name)
            for path in _studies(folders, kind)
            for table in [_table(path)]
            if table is not None
        ]
        if stack:
            collection.studies[kind] = pd.concat(stack, ignore_index=True)
    return collection


def _named(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs with unique names in words. If there are several models, the model comes first."""
    runs = with_labels(runs)
    again = runs.groupby(["of", "label"]).cumcount()
    runs["label"] = [
        f"{label} ({count + 1})" if count else label for label, count in zip(runs["label"], again, strict=True)
    ]
    several = runs["of"].nunique() > 1
    runs["name"] = [
        f"{of}: {label}" if several and of else label for of, label in zip(runs["of"], runs["label"], strict=True)
    ]
    models = runs["model"].fillna("") if "model" in runs else ""
    return runs.assign(model=models, repeated=False).reset_index(drop=True)


def _repeated(runs: pd.DataFrame, protocol: dict[str, dict[str, Any]]) -> pd.Series:
    """Return whether each run measures full precision again: the same model, settings and windows as an earlier run."""
    of_full_precision = runs[(runs["status"] == "finished") & (runs["method"] == FULL_PRECISION)]
    stamps = [
        str([(text, protocol[name][text]) for text in results.evaluated_texts(protocol[name])])
        for name in of_full_precision["name"]
    ]
    again = of_full_precision.assign(stamps=stamps)[["of", "variant", "stamps"]].duplicated()
    return again.reindex(runs.index, fill_value=False)


def _studies(folders: tuple[str | Path, ...], kind: str) -> list[Path]:
    """Return the tables of all studies of a kind, without archived ones."""
    paths = {path.resolve(): path for folder in folders for path in sorted(Path(folder).rglob(f"{kind}.csv"))}
    return [path for path in paths.values() if ARCHIVE not in path.parts]


def _table(path: Path) -> pd.DataFrame | None:
    """Read a CSV file. Return None if it does not exist, is empty or is damaged."""
    try:
        table = pd.read_csv(path).rename(columns=LAYER_COLUMNS if path.name == "layers.csv" else {})
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return None
    except ValueError as error:  # pandas cannot parse or decode it
        _warn_of_damage(path, error)
        return None
    return None if table.empty else table


def _ranges(path: Path) -> Ranges | None:
    """Read the ranges of a run. Return None if the file does not exist or is damaged."""
    if not path.is_file():
        return None
    try:
        return Ranges.open(path)
    except SafetensorError as error:
        _warn_of_damage(path, error)
        return None


def _warn_of_damage(path: Path, error: Exception) -> None:
    say(f"{path} is ignored because it is damaged: {error}", on=errors)
