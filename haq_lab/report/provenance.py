"""Make the tables of what was run: runs, protocols, and their provenance."""

from __future__ import annotations

from typing import Any

import pandas as pd

from haq_lab.report.collect import Collection
from haq_lab.report.tables import Cell, Table, frozen_stamp
from haq_lab.results.load import RANDOM_PROMPTS, evaluated_texts

PROVENANCE = ("started", "python", "torch", "cpu", "threads", "checkpoint", "folder")
STAMP = (
    *("tokenizer", "seqlen", "stride", "windows", "samples", "seed", "tokens_scored"),
    *("split", "join", "level", "text_sha256"),
)


def run_table(collection: Collection) -> Table:
    """Return a table of all runs with their choices, failed and unfinished runs included."""
    groups = [name for name in ("experiment", "model", "quantizer", "backend", "offload") if name in collection.runs]
    groups = [name for name in groups if (collection.runs[name].fillna("none") != "none").any()]
    stages = [name for name in map(str, collection.runs) if name.startswith("time.")]
    rows = []
    for _, run in collection.runs.iterrows():
        row = [Cell(str(run["name"])), Cell(str(run["status"]))]
        row += [Cell("" if pd.isna(run[name]) else str(run[name])) for name in groups]
        seconds = sum(run[name] for name in stages if pd.notna(run[name]))
        rows.append([*row, Cell(f"{seconds:,.1f}" if seconds else "")])
    return Table("Runs", ["run", "status", *groups, "stages, s"], rows, 1)


def protocol_table(collection: Collection) -> Table:
    """Return a table of all different protocol stamps, each with its runs."""
    stamps: dict[Any, tuple[dict[str, Any], list[str]]] = {}
    for name, texts in collection.protocol.items():
        for text, stamp in texts.items():
            stamps.setdefault((text, frozen_stamp(stamp)), (stamp, []))[1].append(name)
    rows = []
    for (text, _), (stamp, names) in stamps.items():
        label, comparable = f"{text} ({stamp.get('text')})", ""
        if evaluated_texts({text: stamp}):
            label, comparable = text, ", ".join(stamp.get("comparable_with", [])) or "nothing published"
        elif text == "latency" and stamp.get("text") == RANDOM_PROMPTS:
            label = "latency (random prompts)"
        runs = (
            "all"
            if len(names) == len(collection.protocol)
            else f"{len(names)}: {names[0]}" + ", ..." * (len(names) > 1)
        )
        settings = "; ".join(f"{name} {stamp[name]}" for name in STAMP if name in stamp)
        rows.append(list(map(Cell, [label, settings, comparable, runs])))
    return Table("Protocol stamps", ["text", "windows", "comparable with", "runs"], rows)


def provenance_table(collection: Collection) -> Table:
    """Return a table with the time, versions, machine, folder and command of each run."""
    names = [name for name in PROVENANCE if name in collection.runs]
    rows = []
    for _, run in collection.runs.iterrows():
        facts = [
            f"{name} {run[name]:g}" if isinstance(run[name], float) else f"{name} {run[name]}"
            for name in names
            if pd.notna(run[name])
        ]
        rows.append([Cell(str(run["name"])), Cell("; ".join(facts)), Cell(f"python -m haq_lab {run['overrides']}")])
    return Table("Provenance", ["run", "time, versions, machine, folder", "command"], rows)
