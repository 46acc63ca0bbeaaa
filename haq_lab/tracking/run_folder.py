"""A run's folder: `config.yaml`, `events.jsonl`, tables, figures, and `results.json` once it is finished.

`results.json` is written last and at once, so a folder that has one is a finished run. A run that fails leaves
`error.json`; a killed one leaves neither and runs again.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from haq_lab.utils.atomic_files import naming_path, write_json, write_text
from haq_lab.utils.errors import UserError

SCHEMA = 1
PARTS = ("run", "config", "protocol", "metrics", "error")
# Settings that do not change the results; `stages` was the name of `result_cache` in older runs.
UNRELATED = ("force", "objective", "search_metric", "result_cache", "stages", "tracking")
ARCHIVE = "previous"  # earlier results of a folder are moved there, never deleted
LEFT = (  # by runs, besides checkpoints; `events.jsonl`, which says that one has begun, is made first and goes last
    *("results.json", "config.yaml", "layers.csv", "experts.csv", "offload.csv", "latency.csv", "lm_eval.csv"),
    *("ranges.safetensors", "routing.safetensors", "experts.bin", "figures", "wandb", "error.json", "events.jsonl"),
)


class RunFolder:
    """Args:
    path: The folder; made where it is not there.
    config: The resolved config, plain.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config = config

    def finished(self) -> dict[str, Any] | None:
        """The results of a finished run of this very config, or None."""
        results = read_results(self.path / "results.json")
        if results is None or _identity(results.get("config", {})) != _identity(self.config):
            return None
        return results

    def begin(self, config_yaml: str) -> None:
        """Start a run here. What a finished one left is archived, what a killed one left is removed.

        Raises:
            UserError: Nothing says that it was a run that left it, and it may be precious (`hydra.run.dir=.`).
        """
        self.path.mkdir(parents=True, exist_ok=True)
        left = [self.path / name for name in LEFT if (self.path / name).exists()]
        names = [item.name for item in left]
        if set(names) - {"error.json"} and not {"results.json", "events.jsonl"} & set(names):
            raise UserError(
                f"hydra.run.dir: '{self.path}' holds '{names[0]}', which no run left; choose another folder"
            )
        if "results.json" in names:
            archive = self._archive()
            for item in left:
                item.replace(archive / item.name)
        else:
            for item in left:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        self.event("begun")
        write_text(self.path / "config.yaml", config_yaml)

    def _archive(self) -> Path:
        """A new folder for earlier results, named by the time."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for name in (stamp, *(f"{stamp}-{number}" for number in range(2, 1000))):
            folder = self.path / ARCHIVE / name
            if not folder.exists():
                folder.mkdir(parents=True)
                return folder
        raise FileExistsError(f"{self.path / ARCHIVE} has a thousand results of {stamp}")

    def event(self, name: str, **facts: Any) -> None:
        """Append a line to `events.jsonl`."""
        line = json.dumps({"time": round(time.time(), 3), "event": name, **facts})
        path = self.path / "events.jsonl"
        with naming_path(path), path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def finish(self, run: dict[str, Any], protocol: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
        """Write `results.json`; from here on the run counts as finished."""
        results = {
            "schema": SCHEMA,
            "run": run,
            "config": self.config,
            "protocol": protocol,
            "metrics": metrics,
        }
        write_json(self.path / "results.json", results)
        return results

    def fail(self, run: dict[str, Any], error: BaseException, mistake: bool) -> None:
        """Write `error.json`, where that is possible: a full disk must not hide the error itself."""
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
    """A `results.json` or `error.json`, or None where it is absent or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    return content if all(isinstance(content.get(part, {}), dict) for part in PARTS) else None


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what does not change the results."""
    return {key: value for key, value in config.items() if key not in UNRELATED}
