"""Describe where a run writes its files and which command line it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunContext:
    """The folder of a run, and the command line that its config was composed from.

    Attributes:
        folder: The run folder. It is created if it does not exist.
        choices: The chosen option of each config group.
        overrides: The overrides of the command line, such as `model=smol`.
        sweep: Folder of the sweep that the run belongs to. None for a single run.
    """

    folder: Path
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    sweep: str | None = None

    @classmethod
    def of_hydra(cls, hydra: Any, folder: Path) -> RunContext:
        """Return the context of a config that Hydra has composed.

        Args:
            hydra: Hydra's own config (`HydraConfig.get()`, or the node `hydra` of `compose`).
            folder: The run folder.
        """
        sweep = str(hydra.sweep.dir) if hydra.mode is not None and hydra.mode.name == "MULTIRUN" else None
        return cls(folder, dict(hydra.runtime.choices), list(hydra.overrides.task), sweep)

    def chosen(self, group: str) -> str | None:
        """Return a group's option, or the class that the user names by `GROUP._target_=MODULE.CLASS`."""
        for override in reversed(self.overrides):
            name, _, target = override.lstrip("+").partition("=")
            if name == f"{group}._target_" and target not in ("", "null"):
                return target.rpartition(".")[2]
        return self.choices.get(group)
