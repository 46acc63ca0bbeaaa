"""Run tasks of EleutherAI's lm-evaluation-harness on the deployed model, through the harness's own wrapper.

measure=[lm_eval] measure.lm_eval.tasks=[hellaswag,arc_easy]                    tasks of the harness, data from the hub
measure=[lm_eval] measure.lm_eval.folder=DIR measure.lm_eval.tasks=[my_task]    your own YAML file, local data
measure=[lm_eval]                                                               `tasks/python_topics`, offline
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass

from haq_lab.measure.base import Study
from haq_lab.utils.errors import UserError, nearest
from haq_lab.utils.extras import need

OWN = Path(__file__).with_name("tasks")
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class LmEval:
    """Accuracy and other metrics on tasks of the lm-evaluation-harness.

    Args:
        tasks: Names of tasks and groups of the harness, and of the YAML tasks in `folder`.
        folder: Folder with YAML tasks. Paths of data in them are relative to it.
        limit: Maximum number of examples per task. If None, all are used.
        fewshot: Examples before each question. If None, each task decides.
        batch: Requests that run at once.

    Raises:
        UserError: No task is named, `folder` does not exist, or the harness is not installed.
    """

    tasks: list[str] = field(default_factory=lambda: ["python_topics"])
    folder: str | None = None
    limit: Positive | None = None
    fewshot: Annotated[int, Field(ge=0)] | None = None
    batch: Positive = 1

    evaluates: ClassVar[bool] = False
    deploys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("measure.lm_eval.tasks: [] is not valid. Name at least one task.")
        if self.folder is not None and not Path(self.folder).expanduser().is_dir():
            raise UserError(
                f"measure.lm_eval.folder: there is no folder '{self.folder}'. Name a folder with YAML tasks."
            )
        _require()

    def __call__(self, study: Study) -> dict[str, float]:
        """Run the tasks. The table `lm_eval.csv` has all results.

        Returns:
            `lm_eval.<task>.<metric>` and `lm_eval.<task>.<metric>_stderr`, as the harness aggregates them.

        Raises:
            UserError: A task does not exist, or its data cannot be loaded.
        """
        study.progress(f"lm_eval: {', '.join(self.tasks)}")
        folder = OWN if self.folder is None else Path(self.folder).expanduser().resolve()
        with _quiet(), contextlib.chdir(folder):
            import datasets
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            datasets.disable_progress_bars()
            manager = self._manager(folder)
            model = HFLM(pretrained=study.whole, tokenizer=study.model.tokenizer(), batch_size=self.batch)
            settings: dict[str, Any] = {"limit": self.limit, "num_fewshot": self.fewshot, "log_samples": False}
            try:
                results = simple_evaluate(
                    model, tasks=self.tasks, task_manager=manager, bootstrap_iters=1000, **settings
                )
            except (OSError, ValueError, RuntimeError) as error:  # raised by `datasets` and the client of the hub
                names = ", ".join(self.tasks)
                raise UserError(
                    f"measure.lm_eval.tasks: {names} cannot run ({error}). Check the names and the network."
                ) from error
        assert results is not None
        study.tables["lm_eval"] = table = _table(results)
        metrics: dict[str, float] = {}
        for row in table.to_dict("records"):
            name = f"lm_eval.{row['task']}.{row['metric']}"
            values = {name: row["value"], f"{name}_stderr": row["stderr"]}
            metrics |= {key: value for key, value in values.items() if pd.notna(value)}
        return metrics

    def _manager(self, folder: Path) -> Any:
        """Return a task manager of the folder's tasks, with the harness's tasks if one of the names needs them."""
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(self.tasks) <= set(manager.all_tasks):
            return manager
        manager = TaskManager(include_path=str(folder))
        for name in self.tasks:
            if name not in manager.all_tasks:
                raise UserError(
                    f"measure.lm_eval.tasks: '{name}' is neither a task of the harness nor in {folder}"
                    f"{nearest(name, manager.all_tasks)}"
                )
        return manager


def _table(results: dict[str, Any]) -> pd.DataFrame:
    """Return one row per task and metric."""
    rows = []
    for task, measured in results["results"].items():
        columns = {"task": task, "version": results["versions"].get(task), "fewshot": results["n-shot"].get(task)}
        columns["examples"] = results.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in measured.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            stderr = measured.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric}.{kind}"
            rows.append({**columns, "metric": label, "value": float(value), "stderr": stderr})
    table = pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "examples", "fewshot", "version"])
    return table.assign(stderr=pd.to_numeric(table["stderr"], errors="coerce"))


def _require() -> None:
    """Check that the harness and its dependencies are installed. Importing them would take seconds."""
    need("measure=[lm_eval]", "lm-eval", "lm_eval", "peft")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log and the progress bars of the harness, and the errors of the git command that it runs."""
    logger = logging.getLogger("lm_eval")
    before, stderr = logger.level, os.dup(2)
    logger.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
        # Both: git writes to the descriptor, and the bars write to Python's object, which differs in a notebook.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        logger.setLevel(before)
