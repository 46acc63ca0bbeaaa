"""What became of a sweep's jobs that ran in other processes: joblib's, SLURM's, ray's.

Such a job leaves `error.json` in its folder when it fails. The process that started the sweep notes what is there
before, and tells afterwards what is new.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from haq_lab.tracking.run_folder import read_results
from haq_lab.utils.console import errors, say

NAME = "error.json"


class JobFailed(Exception):
    """A job's failure on its way to the process that started the sweep: always picklable, unlike its cause."""


class Watch(Callback):
    """Hydra's callback: notes the failures that a sweep's folder holds when the sweep starts."""

    folder: ClassVar[Path | None] = None
    before: ClassVar[dict[Path, int]] = {}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _refuse_shared_folder(config)
        Watch.folder = Path(str(config.hydra.sweep.dir))
        Watch.before = _failures(Watch.folder)


def _refuse_shared_folder(config: DictConfig) -> None:
    """Exit if all jobs of the sweep would use one folder. Hydra turns exceptions of callbacks into warnings."""
    subdir = str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"])  # type: ignore[index, call-overload]
    if "${" not in subdir:
        say(
            f"haq_lab: hydra.sweep.subdir: '{subdir}' is the same for all jobs of a sweep, so they would share one "
            "folder. Remove it, or add '${hydra.job.num}'.",
            on=errors,
        )
        raise SystemExit(2)


def forget() -> None:
    """Before a command runs: an earlier sweep of the same process is none of its business."""
    Watch.folder, Watch.before = None, {}


def new_failures() -> dict[Path, dict[str, Any]]:
    """Folders of this sweep's failed jobs, and their `error`; none where no sweep was started."""
    if Watch.folder is None:
        return {}
    new = [path for path, when in _failures(Watch.folder).items() if Watch.before.get(path) != when]
    return {path.parent: found["error"] for path in sorted(new) if (found := read_results(path)) is not None}


def _failures(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{NAME}")}
