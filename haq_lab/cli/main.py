"""The command line: Hydra composes the config, `runner.run` does the work, mistakes are told in one message.

Exit codes: 0 done (or already done), 1 a bug, 2 a user's mistake, 130 interrupted. `HYDRA_FULL_ERROR=1` shows
stack traces. In a sweep, a job that fails does not stop the others, whichever of Hydra's launchers runs them.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

import haq_lab.config.compose  # noqa: F401  # registers the resolver of the run folder's name
from haq_lab.cli.sweep_failures import JobFailed, Watch, forget, new_failures
from haq_lab.config.explain import explain, is_user_error
from haq_lab.config.help import help_text
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import bundled
from haq_lab.utils.threads import limit_thread_spinning

FULL_ERROR = "HYDRA_FULL_ERROR"
NO_TRIAL = "No trials are completed yet"  # what optuna says then

_failures: list[Exception] = []  # of this process's runs, told as they happened
_traces = False  # whether a mistake shows its stack trace too
_process: int | None = None  # the one that `main` runs in; some of Hydra's launchers run jobs in others


@hydra.main(version_base="1.3", config_path=str(bundled("conf").resolve()), config_name="config")
def _job(config: DictConfig) -> float | None:
    from haq_lab.pipeline.context import RunContext
    from haq_lab.pipeline.run import run, search_metric
    from haq_lab.utils.console import say

    job: Any = HydraConfig.get()
    if job.mode is RunMode.MULTIRUN:
        say(f"\nrun {job.job.num + 1}: {' '.join(job.overrides.task) or 'default'}")
    try:
        results = run(config, RunContext.of_hydra(job, Path(job.runtime.output_dir)))
        return search_metric(config.search_metric, results["metrics"])
    except Exception as error:
        if os.getpid() != _process:
            raise JobFailed(explain(error)) from None
        _failures.append(error)  # and return, so that the other jobs of a sweep run
        _tell(error)
        return None


def _tell(error: Exception) -> None:
    """A mistake in one message; a bug, or whatever `HYDRA_FULL_ERROR=1` wants, with its trace."""
    if _traces or not is_user_error(error):
        traceback.print_exception(error)
    else:
        _print(explain(error))


def _tell_elsewhere() -> bool:
    """Tell the failures of a sweep's jobs in other processes; whether there were any."""
    found = new_failures()
    for folder, error in found.items():
        mistake = error["mistake"]
        _failures.append(UserError(error["message"]) if mistake else RuntimeError(error["message"]))
        _print(f"{folder}: {error['message'] if mistake and not _traces else error['trace']}")
    return bool(found)


def _print(message: str) -> None:
    Console(stderr=True, highlight=False).print(f"haq_lab: {message}", markup=False, soft_wrap=True)


def main() -> None:
    """Parse the command line, run, exit."""
    global _traces, _process
    if any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        Console(highlight=False).print(help_text(), markup=False, soft_wrap=True)
        return
    # `experiment=NAME` is no default, so Hydra wants a plus there; both spellings are welcome.
    sys.argv[1:] = [re.sub(r"^experiment=", "+experiment=", argument) for argument in sys.argv[1:]]
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))  # Hydra's come first
    limit_thread_spinning()
    _failures.clear()
    forget()
    _process = os.getpid()
    before = os.environ.get(FULL_ERROR)
    _traces = before == "1"
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what happened instead of printing it and exiting with 1
    try:
        _job()
    except KeyboardInterrupt:
        _print("interrupted; the same command starts the unfinished runs again")
        sys.exit(130)
    except JobFailed as error:
        if not _tell_elsewhere():
            _failures.append(UserError(str(error)))
            _tell(_failures[0])
    except Exception as error:
        if not (NO_TRIAL in str(error) and (_failures or _tell_elsewhere())):  # a search of which each trial failed
            _failures.append(error)
            _tell(error)
    else:
        if not _failures:
            _tell_elsewhere()  # a search goes on after failures, and raises none
    finally:
        os.environ.pop(FULL_ERROR) if before is None else os.environ.update({FULL_ERROR: before})
    if len(_failures) > 1:
        folder = shlex.quote(str(Watch.folder))
        _print(f"{len(_failures)} runs failed; `python -m haq_lab.results {folder}` lists them with the others")
    if _failures:
        sys.exit(2 if all(map(is_user_error, _failures)) else 1)
