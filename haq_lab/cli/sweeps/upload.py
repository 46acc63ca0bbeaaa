"""Send a sweep to the trackers of its runs: the table of all runs, and the figures of the report."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from haq_lab.tracking.run_folder import RunFolder, read_results
from haq_lab.tracking.tracker import INTERACTIVE, RunRecord, track_run
from haq_lab.utils.atomic_files import write_text
from haq_lab.utils.errors import UserError
from haq_lab.utils.extras import installed


def upload_sweep(folder: Path, since: float) -> None:
    """Send a sweep to the trackers of its runs, as a run of their group. A private sweep is not sent.

    The names of runs, and so the table and the figures, are made of settings. If anything fails, `events.jsonl` in the
    sweep's folder says so, and the sweep does not fail.

    Args:
        folder: The sweep's folder.
        since: Time of the sweep's start, in seconds since the epoch. If no run has finished since, nothing is sent.
    """
    new = [path for path in folder.glob("*/results.json") if path.stat().st_mtime >= since]
    if not new or (results := read_results(max(new, key=lambda path: path.stat().st_mtime))) is None:
        return
    config: dict[str, Any] = results["config"]
    if not any(isinstance(node, dict) for node in config["tracking"].values()) or config["tracking"].get("private"):
        return
    sweep = RunFolder(folder, {})
    try:
        _send(sweep, config, str(results["run"]["sweep"]))
    except UserError:
        return  # the package of the tracker is not installed, as each run has said
    except Exception as error:  # such as a plug-in's class that another process could import
        with suppress(OSError):
            sweep.event("upload_failed", error=f"{type(error).__name__}: {error}")


def _send(sweep: RunFolder, config: dict[str, Any], group: str) -> None:
    from omegaconf import OmegaConf

    from haq_lab.config.build import make_trackers
    from haq_lab.results.load import load

    trackers = make_trackers(OmegaConf.create(config))
    runs = load(sweep.path).dropna(axis="columns", how="all")
    with tempfile.TemporaryDirectory(dir=sweep.path, prefix=".figures") as figures:
        files = list(_figures(sweep.path, Path(figures))) if installed("plotly", "matplotlib") else []
        track_run(trackers, sweep, RunRecord(f"sweep {sweep.path.name}", group, {}, {"runs": runs}, files))


def _figures(sweep: Path, folder: Path) -> Iterator[Path]:
    """Write the report's charts of a sweep to a folder, one file for each variant."""
    from haq_lab.report.chart import Chart
    from haq_lab.report.collect import collect
    from haq_lab.report.page import CHARTS

    collection = collect(sweep)
    for draw in CHARTS.values():
        if not isinstance(chart := draw(collection), Chart):
            continue  # a sentence that says why there is no such figure
        for variant, figure in chart.variants.items():
            name = chart.title if len(chart.variants) == 1 else f"{chart.title} {variant}"
            path = folder / (re.sub(r"\W+", "-", name.lower()).strip("-") + INTERACTIVE)
            write_text(path, figure.to_json())
            yield path
