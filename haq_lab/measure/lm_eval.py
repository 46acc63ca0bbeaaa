"""Tasks of EleutherAI's lm-evaluation-harness, run on the model as deployed: the very object, int8 products and all,
through the harness's own wrapper.

measure=[lm_eval] measure.lm_eval.tasks=[hellaswag,arc_easy]                    the harness's own; data from the hub
measure=[lm_eval] measure.lm_eval.folder=DIR measure.lm_eval.tasks=[my_task]    a YAML file of yours; local data
measure=[lm_eval]                                                               `tasks/python_topics`, ours, offline
"""

from __future__ import annotations

import contextlib
import importlib.util
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

OWN = Path(__file__).with_name("tasks")
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class LmEval:
    """Args:
    tasks: Names: of the harness's tasks and groups, and of the YAML tasks in `folder`.
    folder: YAML tasks; paths of data in them are relative to it.
    limit: So many examples of each task.
    fewshot: Examples before each question.
    batch: Requests that run at once.
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
            raise UserError("measure.lm_eval.tasks: name at least one task")
        if self.folder is not None and not Path(self.folder).expanduser().is_dir():
            raise UserError(f"measure.lm_eval.folder: there is no folder '{self.folder}'")
        _require()

    def __call__(self, study: Study) -> dict[str, float]:
        """`lm_eval.<task>.<metric>` and `..._stderr`, as the harness aggregates them; `lm_eval.csv` has them all.

        Raises:
            UserError: No such task, or its data cannot be had.
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
                found = simple_evaluate(model, tasks=self.tasks, task_manager=manager, bootstrap_iters=1000, **settings)
            except (OSError, ValueError, RuntimeError) as error:  # of `datasets` and of the hub's client
                raise UserError(f"measure.lm_eval: {', '.join(self.tasks)} cannot run ({error})") from error
        assert found is not None
        study.tables["lm_eval"] = table = _table(found)
        metrics: dict[str, float] = {}
        for row in table.to_dict("records"):
            name = f"lm_eval.{row['task']}.{row['metric']}"
            told = {name: row["value"], f"{name}_stderr": row["stderr"]}
            metrics |= {key: value for key, value in told.items() if pd.notna(value)}
        return metrics

    def _manager(self, folder: Path) -> Any:
        """Knows the folder's tasks; the harness's thousands too, where one of the names is none of those."""
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(self.tasks) <= set(manager.all_tasks):
            return manager
        manager = TaskManager(include_path=str(folder))
        for name in self.tasks:
            if name not in manager.all_tasks:
                raise UserError(
                    f"measure.lm_eval.tasks: '{name}' is neither one of the harness's tasks nor in {folder}"
                    f"{nearest(name, manager.all_tasks)}"
                )
        return manager


def _table(found: dict[str, Any]) -> pd.DataFrame:
    """A row for each task and metric."""
    rows = []
    for task, measured in found["results"].items():
        facts = {"task": task, "version": found["versions"].get(task), "fewshot": found["n-shot"].get(task)}
        facts["examples"] = found.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in measured.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            stderr = measured.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric}.{kind}"
            rows.append({**facts, "metric": label, "value": float(value), "stderr": stderr})
    table = pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "examples", "fewshot", "version"])
    return table.assign(stderr=pd.to_numeric(table["stderr"], errors="coerce"))


def _require() -> None:
    """Look for the harness and what its wrapper imports, without importing them: that takes seconds."""
    for package in ("lm_eval", "peft"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"measure: lm_eval needs the package '{package}'; run: pip install 'haq-lab[lm_eval]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log, which tells each choice that it makes, its bars, which would break into ours, and the
    complaints of the git that it asks for a commit."""
    logger = logging.getLogger("lm_eval")
    before, stderr = logger.level, os.dup(2)
    logger.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
        # Twice: git writes to the descriptor, the bars to Python's object, which in a notebook is another one.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        logger.setLevel(before)
