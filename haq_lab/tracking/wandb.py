"""Track runs with W&B: one W&B run for each run, and one group for each sweep. All files stay in the run folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic.dataclasses import dataclass

from haq_lab.tracking.run_folder import RunFolder

MAX_NAME = 128  # W&B's limit for names and groups


@dataclass
class Wandb:
    """Tracker that writes W&B files, and uploads them if `mode` is `online`.

    Args:
        mode: `offline` writes files that `python -m haq_lab.tracking sync` can upload later. `online` uploads at once.
        project: The W&B project.
    """

    mode: Literal["offline", "online"] = "offline"
    project: str = "haq_lab"

    def start(self, folder: RunFolder, name: str, group: str | None) -> None:
        """Begin a W&B run. Names that are too long for W&B are cut."""
        self._folder = folder.path
        self._metrics: dict[str, float] = {}
        self._tables: dict[str, pd.DataFrame] = {}
        self._figures: list[Path] = []
        self._artifacts: list[tuple[Path, str]] = []
        with _files_inside(self._folder):
            import wandb

            settings = wandb.Settings(silent=True, console="off", init_timeout=20, login_timeout=20, finish_timeout=120)
            self._run: Any = wandb.init(
                project=self.project,
                name=name[:MAX_NAME],
                group=group and group[-MAX_NAME:],
                config=folder.config,
                mode=self.mode,
                dir=str(folder.path),
                reinit="finish_previous",
                settings=settings,
            )

    def metrics(self, values: Mapping[str, float]) -> None:
        self._metrics |= values

    def table(self, name: str, content: pd.DataFrame) -> None:
        self._tables[name] = content

    def figure(self, path: Path) -> None:
        self._figures.append(path)

    def artifact(self, path: Path, kind: str) -> None:
        self._artifacts.append((path, kind))

    def finish(self) -> None:
        """Log everything as one step, because each call of W&B's `log` starts a new one, and end the W&B run."""
        with _files_inside(self._folder):
            import wandb

            content: dict[str, Any] = dict(self._metrics)
            for name, table in self._tables.items():
                content[name] = wandb.Table(dataframe=table.astype(object).where(table.notna(), None))
            content |= {f"figures/{path.stem}": wandb.Image(str(path)) for path in self._figures}
            self._run.log(content)
            for path, kind in self._artifacts:
                label = re.sub(r"[^\w.-]", "-", f"{kind}-{path.parent.name}")[:MAX_NAME]
                artifact = wandb.Artifact(label, type=kind, metadata={"folder": str(path.parent)})
                artifact.add_file(str(path))
                self._run.log_artifact(artifact)
            self._run.finish()


@contextmanager
def _files_inside(folder: Path) -> Iterator[None]:
    """Within the block, let W&B write all its files inside the run folder."""
    names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")
    before = {name: os.environ.get(name) for name in names}
    own = folder.resolve() / "wandb"
    own.mkdir(parents=True, exist_ok=True)
    os.environ.update({name: str(folder.resolve() if name == "WANDB_DIR" else own) for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
