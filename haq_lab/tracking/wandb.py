"""Track runs with W&B: one W&B run for each run, and one group for each sweep.

All files stay in the run folder. docs/guides/tracking.md lists what is uploaded. The environment variable `WANDB_MODE`
can only restrict the setting `mode`.
`WANDB_RUN_ID` and `WANDB_RESUME` are ignored, because all runs of a sweep would get the same id.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from haq_lab.tracking.run_folder import RunFolder
from haq_lab.tracking.tracker import artifact_name, interactive
from haq_lab.utils.extras import need

if TYPE_CHECKING:
    import pandas as pd

MAX_NAME = 128  # W&B's limit for names and groups
Mode = Literal["disabled", "offline", "online"]
MODES: tuple[Mode, ...] = ("disabled", "offline", "online")  # each sends more than the one before it
MODE_LIMITS: dict[str, Mode] = {"disabled": "disabled", "dryrun": "offline", "offline": "offline"}  # by WANDB_MODE
XDG = ("XDG_DATA_HOME", "XDG_CACHE_HOME")  # W&B evaluates these defaults, although it does not use them
# Settings of W&B that leave out the machine, the process and the repository.
PRIVATE = {
    **dict.fromkeys(("x_disable_meta", "x_disable_machine_info", "x_disable_stats"), True),
    **dict.fromkeys(("disable_git", "disable_code"), True),
    "x_save_requirements": False,
    "host": "private",
    "username": "private",
    "email": "private",
}
IDENTITY = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")


@dataclass
class Wandb:
    """Tracker that writes W&B files, and uploads them if `mode` is `online`.

    Args:
        mode: `offline` writes files that `python -m haq_lab.tracking sync` can upload later. `online` uploads at once.
            `WANDB_MODE=offline` turns `online` into `offline`. `WANDB_MODE=disabled` turns the tracker off.
        project: The W&B project.
        private: Whether W&B's own description of the machine, the process and the repository is left out. The setting
            `tracking.private` gives it.

    Raises:
        UserError: W&B is not installed.
    """

    mode: Literal["offline", "online"] = "offline"
    project: str = "haq_lab"
    private: bool = False

    def __post_init__(self) -> None:
        need(f"tracking={self.mode}", "wandb", "wandb")

    def start(self, folder: RunFolder, name: str, group: str | None) -> None:
        """Begin a W&B run with an id of its own. Names that are too long for W&B are cut."""
        self._run: Any = None
        self._metrics: dict[str, float] = {}
        self._tables: dict[str, pd.DataFrame] = {}
        self._figures: list[Path] = []
        self._artifacts: list[tuple[Path, str]] = []
        mode: Mode = min(self.mode, _mode_limit(), key=MODES.index)
        if mode == "disabled":
            return
        self._folder = folder.path
        with _files_inside(self._folder):
            import wandb

            os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # W&B advertises it if a process uses openai
            timeouts = {"init_timeout": 20, "login_timeout": 20, "finish_timeout": 120}
            settings = wandb.Settings(silent=True, console="off", **timeouts, **(PRIVATE if self.private else {}))
            self._run = wandb.init(
                project=self.project,
                id=secrets.token_hex(8),
                name=name[:MAX_NAME],
                group=group and group[-MAX_NAME:],
                config=folder.config,
                mode=mode,
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
        if self._run is None:
            return
        with _files_inside(self._folder):
            import wandb

            content: dict[str, Any] = dict(self._metrics)
            for name, table in self._tables.items():
                content[name] = wandb.Table(dataframe=table.astype(object).where(table.notna(), None))
            for path in self._figures:
                drawn = interactive(path)
                name = f"figures/{path.name.partition('.')[0]}"
                content[name] = wandb.Image(str(path)) if drawn is None else wandb.Plotly(drawn)
            self._run.log(content)
            for path, kind in self._artifacts:
                label = artifact_name(path, kind)[:MAX_NAME]
                artifact = wandb.Artifact(label, type=kind, metadata={"folder": str(path.parent)})
                artifact.add_file(str(path))
                self._run.log_artifact(artifact)
            self._run.finish()


def _mode_limit() -> Mode:
    """Return the mode that W&B's environment variables allow at most."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    return MODE_LIMITS.get(os.environ.get("WANDB_MODE", "").lower(), "online")


@contextmanager
def _files_inside(folder: Path) -> Iterator[None]:
    """Within the block, W&B writes all files inside the run folder, and ignores the run that its environment names."""
    own = folder.resolve() / "wandb"
    own.mkdir(parents=True, exist_ok=True)
    places = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR", *XDG)
    values = dict.fromkeys(places, str(own)) | {"WANDB_DIR": str(folder.resolve())}
    before = {name: os.environ.pop(name, None) for name in (*values, *IDENTITY)}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
