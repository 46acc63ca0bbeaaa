"""Prepare sweeps, and find the failures of their jobs that ran in other processes (joblib, SLURM, ray).

A failed job leaves `error.json` in its folder. The process that started the sweep lists these files before the first
job and after the last one. The new files are the failures of this sweep.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from haq_lab.cli.sweeps.setup import refuse_shared_folders, resume_search, swept_settings
from haq_lab.cli.sweeps.upload import upload_sweep
from haq_lab.tracking.run_folder import read_results
from haq_lab.utils.console import errors, say
from haq_lab.utils.errors import UserError

NAME = "error.json"


class JobFailed(Exception):
    """Failure of a job in another process. It carries only the message, so that it can always be pickled."""


class Watch(Callback):
    """Hydra callback that prepares a sweep, notes the failures that its folder already has, and tracks its end."""

    folder: ClassVar[Path | None] = None
    swept: ClassVar[list[str]] = []  # settings in which its jobs differ; empty in other processes
    before: ClassVar[dict[Path, int]] = {}
    started: ClassVar[float] = 0.0  # seconds since the epoch

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Prepare a sweep before its first job. Exit with code 2 if its jobs would share a folder."""
        with suppress(HydraException, OmegaConfBaseException):  # raised again when Hydra composes the jobs
            try:
                refuse_shared_folders(config)
                Watch.swept = swept_settings(config)
            except UserError as error:  # Hydra turns exceptions of callbacks into warnings
                say(f"haq_lab: {error}", on=errors)
                raise SystemExit(2) from None
        resume_search(config)
        Watch.folder = Path(str(config.hydra.sweep.dir))
        Watch.before = _failures(Watch.folder)
        Watch.started = time.time()

    @classmethod
    def job_name(cls, overrides: Sequence[str]) -> str:
        """Return the overrides in which a job differs from the others. If there is none: all overrides."""
        own = [one for one in overrides if one.lstrip("+~").partition("=")[0] in cls.swept]
        return " ".join(own or overrides) or "default"

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Send the sweep's table and figures to the trackers of its runs."""
        if Watch.folder is not None:
            upload_sweep(Watch.folder, Watch.started)


def forget() -> None:
    """Forget an earlier sweep of the same process."""
    Watch.folder, Watch.before, Watch.swept = None, {}, []


def new_failures() -> dict[Path, dict[str, Any]]:
    """Return the node `error` of each `error.json` that is new since the sweep started, by the folder of its job."""
    if Watch.folder is None:
        return {}
    new = [path for path, modified in _failures(Watch.folder).items() if Watch.before.get(path) != modified]
    return {path.parent: record["error"] for path in sorted(new) if (record := read_results(path)) is not None}


def _failures(folder: Path) -> dict[Path, int]:
    """Return the time of modification, in nanoseconds, of each `error.json` in the folders of the jobs."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{NAME}")}
