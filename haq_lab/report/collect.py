"""What lies below some folders: runs and their tables, replays (`hit_rates.csv`) and plans (`plan.csv`)."""

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
from haq_lab.tracking.run_folder import ARCHIVE
from haq_lab.utils.console import errors, say

TABLES = ("layers", "experts", "latency")  # of what runs leave as <name>.csv, those that charts are drawn from
STUDIES = ("hit_rates", "plan")  # what `python -m haq_lab.offload replay` and `plan` leave

LONGEST = 80  # characters of a run's name; an unfinished run has only its folder's


@dataclass
class Collection:
    """Attributes:
    runs: As `haq_lab.results.load` gives them.
    tables: By name, what the finished runs have left, stacked, with a column `run`.
    ranges: By run, its inputs' ranges.
    studies: By name, the replays' and plans' tables, stacked, with a column `study`: the folder's name.
    protocol: By run, its stamps by text.
    metrics: Metrics that the users' own measures declare, by name or pattern.
    """

    runs: pd.DataFrame
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    ranges: dict[str, Ranges] = field(default_factory=dict)
    studies: dict[str, pd.DataFrame] = field(default_factory=dict)
    protocol: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)

    def by_model(self) -> list[tuple[str, pd.DataFrame]]:
        """The finished runs of each model, by names without the model's."""
        groups = self.finished.groupby("model", sort=False)
        return [(str(model), runs.assign(label=runs["name"].str.removeprefix(f"{model} "))) for model, runs in groups]

    def by_study(self, kind: str) -> list[tuple[str, pd.DataFrame]]:
        """Each study's table of a kind (`STUDIES`); none where there are none."""
        if kind not in self.studies:
            return []
        return [(str(study), table) for study, table in self.studies[kind].groupby("study", sort=False)]

    @property
    def finished(self) -> pd.DataFrame:
        """The runs that have results."""
        return self.runs[self.runs["status"] == "finished"]


def collect(*folders: str | Path) -> Collection:
    """Read everything below `folders`.

    Raises:
        UserError: A folder does not exist.
    """
    runs = results.load(*folders)
    found = Collection(_named(runs), metrics=runs.attrs["own_metrics"])
    stacks: dict[str, list[pd.DataFrame]] = {}
    for _, run in found.finished.iterrows():
        folder, name = Path(run["folder"]), str(run["name"])
        record = read_record(folder / "results.json") or {}
        found.protocol[name] = record.get("protocol", {})
        for kind in TABLES:
            if (table := _table(folder / f"{kind}.csv")) is not None:
                stacks.setdefault(kind, []).append(table.assign(run=name))
        if (ranges := _ranges(folder / FILE)) is not None:
            found.ranges[name] = ranges
    found.tables = {kind: pd.concat(stack, ignore_index=True) for kind, stack in stacks.items()}
    for kind in STUDIES:
        stack = [
            table.assign(study=path.parent.name)
            for path in _studies(folders, kind)
            for table in [_table(path)]
            if table is not None
        ]
        if stack:
            found.studies[kind] = pd.concat(stack, ignore_index=True)
    return found


def _named(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs by shorter names: within a model's, what they differ in; the model stands before where there are several. A
    run that ended before its model was known keeps its name."""
    models = runs["model"].fillna("") if "model" in runs else pd.Series("", runs.index)
    for model in filter(None, models.unique()):
        own = runs[models == model]
        rows = (
            own.astype(object).where(own.notna(), None).assign(name=own["folder"].map(lambda folder: Path(folder).name))
        )
        names = results.short_names(rows.to_dict("records"))
        runs.loc[own.index, "name"] = [f"{model} {name}".strip() if models.nunique() > 1 else name for name in names]
    cut = runs["name"].map(lambda name: name if len(name) <= LONGEST else f"{name[:LONGEST]}...")
    again = cut.groupby(cut).cumcount()
    runs["name"] = [name if not count else f"{name} ({count + 1})" for name, count in zip(cut, again, strict=True)]
    return runs.assign(model=models).sort_values(["model", "name"], ignore_index=True)


def _studies(folders: tuple[str | Path, ...], kind: str) -> list[Path]:
    found = {path.resolve(): path for folder in folders for path in sorted(Path(folder).rglob(f"{kind}.csv"))}
    return [path for path in found.values() if ARCHIVE not in path.parts]


def _table(path: Path) -> pd.DataFrame | None:
    """A CSV file; None where there is none, nothing in it, or nothing that can be read."""
    try:
        table = pd.read_csv(path).rename(columns=LAYER_COLUMNS if path.name == "layers.csv" else {})
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return None
    except ValueError as error:  # pandas' parser's, and of text that is none
        _tell_damaged(path, error)
        return None
    return None if table.empty else table


def _ranges(path: Path) -> Ranges | None:
    """A run's ranges; None where it has none, or none that can be read."""
    if not path.is_file():
        return None
    try:
        return Ranges.open(path)
    except SafetensorError as error:
        _tell_damaged(path, error)
        return None


def _tell_damaged(path: Path, error: Exception) -> None:
    say(f"{path} is left out: it is damaged ({error})", on=errors)
