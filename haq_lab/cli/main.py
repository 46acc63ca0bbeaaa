"""Run experiments from the command line: `python -m haq_lab`.

Hydra composes the config, and `pipeline.run` runs it. If a job of a sweep fails, the other jobs run nevertheless, with
each of Hydra's launchers. `HYDRA_FULL_ERROR=1` shows stack traces.

Exit codes: 0 finished (now or before), 1 a bug, 2 an error that the user can correct, 130 interrupted.
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

import haq_lab.config.compose  # noqa: F401  # registers the resolver `folder_name`
from haq_lab.cli.sweeps.failures import JobFailed, Watch, forget, new_failures
from haq_lab.config.explain import explain, is_user_error
from haq_lab.config.help import help_text
from haq_lab.hardware.threads import limit_thread_spinning
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import bundled

FULL_ERROR = "HYDRA_FULL_ERROR"
NO_TRIAL = "No trials are completed yet"  # optuna's message if each trial of a search failed

_failures: list[Exception] = []  # failures of the jobs so far
_show_traces = False  # whether user errors are printed with a stack trace too
_main_process: int | None = None  # id of the process of `main`; some of Hydra's launchers run jobs in others


@hydra.main(version_base="1.3", config_path=str(bundled("conf").resolve()), config_name="config")
def _job(config: DictConfig) -> float | None:
    from haq_lab.config.architecture import refuse_unknown_architecture
    from haq_lab.config.run_context import RunContext
    from haq_lab.utils.console import say

    job: Any = HydraConfig.get()
    if job.mode is RunMode.MULTIRUN:
        say(f"\nrun {job.job.num + 1}: {Watch.job_name(job.overrides.task)}")
    try:
        refuse_unknown_architecture(config)
        from haq_lab.pipeline.run import run, search_metric  # after the refusal, because it imports torch

        results = run(config, RunContext.of_hydra(job, Path(job.runtime.output_dir)))
        return search_metric(config.search_metric, results["metrics"])
    except Exception as error:
        if os.getpid() != _main_process:
            raise JobFailed(explain(error)) from None
        printed = [] if _show_traces else [explain(one) for one in _failures if is_user_error(one)]
        _failures.append(error)  # not raised, so that the other jobs of a sweep run
        if is_user_error(error) and explain(error) in printed:
            _print("the same message as above.")
        else:
            _report(error)
        return None


def _report(error: Exception) -> None:
    """Print a user error as one message, and a bug with its stack trace."""
    if _show_traces or not is_user_error(error):
        traceback.print_exception(error)
    else:
        _print(explain(error))


def _report_other_processes() -> bool:
    """Print the failures of a sweep's jobs in other processes. Return whether there were any."""
    failures = new_failures()
    for folder, error in failures.items():
        is_mistake = error["mistake"]
        _failures.append(UserError(error["message"]) if is_mistake else RuntimeError(error["message"]))
        _print(f"{folder}: {error['message'] if is_mistake and not _show_traces else error['trace']}")
    return bool(failures)


def _print(message: str) -> None:
    Console(stderr=True, highlight=False).print(f"haq_lab: {message}", markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line of this process, and exit with its exit code."""
    global _show_traces, _main_process
    if any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        Console(highlight=False).print(help_text(), markup=False, soft_wrap=True)
        return
    # Hydra needs a plus before a group without a default. Both spellings are allowed here.
    sys.argv[1:] = [re.sub(r"^experiment=", "+experiment=", argument) for argument in sys.argv[1:]]
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))  # flags first
    limit_thread_spinning()
    _failures.clear()
    forget()
    _main_process = os.getpid()
    before = os.environ.get(FULL_ERROR)
    _show_traces = before == "1"
    os.environ[FULL_ERROR] = "1"  # lets Hydra raise an error instead of printing it and exiting with code 1
    try:
        _job()
    except KeyboardInterrupt:
        _print("interrupted. The same command runs the unfinished runs again.")
        sys.exit(130)
    except JobFailed as error:
        if not _report_other_processes():
            _failures.append(UserError(str(error)))
            _report(_failures[0])
    except Exception as error:
        every_trial_failed = NO_TRIAL in str(error) and (_failures or _report_other_processes())
        if not every_trial_failed:  # if so, the failures of the trials are printed already
            _failures.append(error)
            _report(error)
    else:
        if not _failures:
            _report_other_processes()  # a search raises no error if only some trials fail
    finally:
        os.environ.pop(FULL_ERROR) if before is None else os.environ.update({FULL_ERROR: before})
    if len(_failures) > 1:
        folder = shlex.quote(str(Watch.folder))
        _print(f"{len(_failures)} runs failed. List all runs with `python -m haq_lab.results {folder}`.")
    if _failures:
        sys.exit(2 if all(map(is_user_error, _failures)) else 1)
