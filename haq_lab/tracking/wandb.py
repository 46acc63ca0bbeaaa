"""W&B as a sink: config, metrics, tables, figures and the checkpoint's manifest, one W&B run a job, grouped by sweep.

All its files stay inside the run folder. Whatever goes wrong with it, the run goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic.dataclasses import dataclass

from haq_lab.tracking.run_folder import RunFolder

LONGEST = 128  # W&B's limit for names and groups


@dataclass(frozen=True)
class Wandb:
    """Args:
    mode: `offline` writes files that `python -m haq_lab.tracking sync` can upload later; `online` uploads.
    project: W&B project.
    """

    mode: Literal["offline", "online"] = "offline"
    project: str = "haq_lab"

    def log(
        self,
        folder: RunFolder,
        name: str,
        group: str | None,
        metrics: dict[str, float],
        tables: dict[str, pd.DataFrame],
        figures: list[Path],
        manifest: Path | None = None,
    ) -> None:
        """Send one finished run, and the manifest of the checkpoint that it wrote. A failure is noted in `events.jsonl`
        and on no account raised."""
        with _never_failing(folder), _kept_inside(folder.path):
            import wandb

            settings = wandb.Settings(silent=True, console="off", init_timeout=20, login_timeout=20, finish_timeout=120)
            run = wandb.init(
                project=self.project,
                name=name[:LONGEST],
                group=group and group[-LONGEST:],
                config=folder.config,
                mode=self.mode,
                dir=str(folder.path),
                reinit="finish_previous",
                settings=settings,
            )
            content: dict[str, Any] = dict(metrics)
            for key, table in tables.items():
                content[key] = wandb.Table(dataframe=table.astype(object).where(table.notna(), None))
            content |= {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}
            run.log(content)
            if manifest is not None:
                label = re.sub(r"[^\w.-]", "-", f"checkpoint-{manifest.parent.name}")[:LONGEST]
                artifact = wandb.Artifact(label, type="checkpoint", metadata={"folder": str(manifest.parent)})
                artifact.add_file(str(manifest))
                run.log_artifact(artifact)
            run.finish()


@contextmanager
def _never_failing(folder: RunFolder) -> Iterator[None]:
    """A run never fails because W&B does."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):
            folder.event("wandb_failed", error=f"{type(error).__name__}: {error}")


@contextmanager
def _kept_inside(folder: Path) -> Iterator[None]:
    """Point W&B's own folders into the run folder within the block."""
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
