"""Manage the folder of a run: `config.yaml`, `events.jsonl`, tables, figures and `results.json`.

`results.json` is written atomically and last, so a folder that contains it is a finished run. A failed run leaves
`error.json`. A killed run leaves neither, so the same command runs it again.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from haq_lab.utils.atomic_files import naming_path, remove_leftovers, write_json, write_text
from haq_lab.utils.errors import UserError
from haq_lab.utils.exclusive_lock import LockedError, exclusive_lock

SCHEMA = 1
PARTS = ("run", "config", "protocol", "metrics", "not_finite", "error")
# Settings that do not change the results; `stages` was the name of `result_cache` in older runs.
UNRELATED = ("force", "objective", "search_metric", "seeds", "result_cache", "stages", "tracking")
ARCHIVE = "previous"  # earlier results of a folder are moved there and never deleted
UNFINISHED = ".part"  # suffix of an archive until all files have been moved to it
RUN_FILES = (  # everything that runs write, apart from checkpoints
    # `results.json` is archived first, so that a run with missing files never looks finished.
    *("results.json", "config.yaml", "layers.csv", "experts.csv", "offload.csv", "latency.csv", "lm_eval.csv"),
    "windows.csv",
    # `events.jsonl` shows that a run began here. So it is the first file of a run and the last to be removed.
    *("ranges.safetensors", "routing.safetensors", "experts.bin", "figures", "wandb", "error.json", "events.jsonl"),
)


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder. `begin` creates it if necessary.
        config: The resolved config, as plain dictionaries.

    Example:
        >>> folder = RunFolder(Path("runs/first"), {"quantizer": "rtn"})  # doctest: +SKIP
        >>> with folder.locked():  # doctest: +SKIP
        ...     folder.begin("quantizer: rtn")
        ...     folder.finish({}, {}, {"perplexity.wikitext": 12.3})
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config = config

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other processes from the folder within the block.

        Raises:
            UserError: Another process uses the folder. The message names it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive_lock(self.path / ".lock"):
                yield
        except LockedError as error:
            raise UserError(
                f"hydra.run.dir: '{self.path}' is in use by {error}. Wait until it ends, or choose another folder."
            ) from None

    def finished(self) -> dict[str, Any] | None:
        """Return the results if the folder contains a finished run of the same config, otherwise None."""
        results = read_results(self.path / "results.json")
        if results is None or _identity(results.get("config", {})) != _identity(self.config):
            return None
        return results

    def begin(self, config_yaml: str) -> None:
        """Start a run. The files of an earlier run are archived if it finished, and removed if it did not.

        Args:
            config_yaml: Content of `config.yaml`.

        Raises:
            UserError: The folder has files with a run's names, but no run began here (`hydra.run.dir=.`).
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        present = [name for name in RUN_FILES if (self.path / name).exists()]
        archive = next(self.path.glob(f"{ARCHIVE}/*{UNFINISHED}"), None)  # a run was killed while it archived
        is_run = archive is not None or "results.json" in present or "events.jsonl" in present
        if not is_run and set(present) - {"error.json"}:
            raise UserError(
                f"hydra.run.dir: '{self.path}' contains '{present[0]}', which no run wrote. Choose another folder."
            )
        if archive is not None or "results.json" in present:
            self._archive(present, archive or self._new_archive())
        self._remove_run_files()
        self.event("begun")
        write_text(self.path / "config.yaml", config_yaml)

    def _archive(self, names: list[str], archive: Path) -> None:
        """Move files to an archive. If the process is killed, the next run continues here."""
        for name in names:
            if not (archive / name).exists():  # an interrupted run can leave a second `error.json`
                (self.path / name).replace(archive / name)
        archive.replace(archive.with_suffix(""))

    def _new_archive(self) -> Path:
        """Create an unfinished archive, named by the current time."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for name in (stamp, *(f"{stamp}-{number}" for number in range(2, 1000))):
            if not (self.path / ARCHIVE / name).exists():
                archive = self.path / ARCHIVE / f"{name}{UNFINISHED}"
                archive.mkdir(parents=True)
                return archive
        raise FileExistsError(f"{self.path / ARCHIVE} contains a thousand archives of {stamp}.")

    def _remove_run_files(self) -> None:
        for path in (self.path / name for name in RUN_FILES):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def event(self, name: str, **fields: Any) -> None:
        """Append an event to `events.jsonl`.

        Args:
            name: Name of the event.
            fields: Values of the event that JSON can represent.
        """
        line = json.dumps({"time": round(time.time(), 3), "event": name, **fields})
        path = self.path / "events.jsonl"
        with naming_path(path), path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def finish(self, run: dict[str, Any], protocol: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
        """Write `results.json`. Afterwards the run counts as finished.

        Args:
            run: Description of the run and the machine.
            protocol: Description of the texts and their windows, by dataset.
            metrics: Metrics by name. Infinity and NaN become `null`, and `not_finite` has the reason.

        Returns:
            The content of `results.json`.
        """
        not_finite = {name: _reason(value) for name, value in metrics.items() if not math.isfinite(value)}
        results = {
            "schema": SCHEMA,
            "run": run,
            "config": self.config,
            "protocol": protocol,
            "metrics": {name: None if name in not_finite else value for name, value in metrics.items()},
            **({"not_finite": not_finite} if not_finite else {}),
        }
        write_json(self.path / "results.json", results)
        return results

    def fail(self, run: dict[str, Any], error: BaseException, mistake: bool) -> None:
        """Write `error.json`, if possible. A full disk must not hide the error itself.

        Args:
            run: Description of the run and the machine.
            error: The error that ended the run.
            mistake: Whether the user can correct it.
        """
        content = {
            "type": type(error).__name__,
            "message": str(error) or type(error).__name__,
            "mistake": mistake,
            "trace": "".join(traceback.format_exception(error)),
        }
        with suppress(OSError):
            write_json(
                self.path / "error.json", {"schema": SCHEMA, "run": run, "config": self.config, "error": content}
            )


def read_results(path: Path) -> dict[str, Any] | None:
    """Return the content of a `results.json` or `error.json`. None if the file is absent or not valid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    return content if all(isinstance(content.get(part, {}), dict) for part in PARTS) else None


def _reason(value: float) -> str:
    """Explain why a metric is infinite or NaN."""
    if math.isnan(value):
        return "not a number, because activations or logits overflowed"
    return "larger than a 64-bit float can represent"


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the settings that do not change the results."""
    return {name: value for name, value in config.items() if name not in UNRELATED}
