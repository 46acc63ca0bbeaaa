"""The command line within the tests' own process, and the least that still is a whole run."""

from __future__ import annotations

import io
import logging
import os
import pickle
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

import torch
from hydra.core.global_hydra import GlobalHydra

from haq_lab.cli import main as cli
from haq_lab.quantizers.rtn import RTN

TINY = [
    "model=tiny_llama",
    "quantizer=rtn",
    "backend=reference",
    "calibration.samples=4",
    "calibration.seqlen=64",
    "data.python_docs.seqlen=64",
    "data.python_docs.windows=2",
    "measure=[perplexity]",
    "tracking=none",
    "result_cache.enabled=false",
]


class Broken(RTN):
    """A quantizer with a bug."""

    def solve(self, weight, statistics, activation):
        raise RuntimeError("a bug in a plug-in")


class Outcome(NamedTuple):
    """An exit code and what was printed."""

    code: int
    out: str
    err: str


def launch(*arguments: str) -> Outcome:
    """`python -m haq_lab ARGUMENTS`, without a process of its own."""
    GlobalHydra.instance().clear()
    out, err = io.StringIO(), io.StringIO()
    code = 0
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    torch.set_num_threads(1)  # threads only wait for one another on models this small
    with mock.patch.object(sys, "argv", ["haq_lab", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    root.setLevel(level)  # Hydra changes the root logger and disables all others
    root.handlers[:] = handlers
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
    return Outcome(code, out.getvalue(), err.getvalue())


def apart(*arguments: str) -> Outcome:
    """The same in a fork of this process, which has imported everything already: for what starts processes itself."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        outcome = Outcome(99, "", "")
        try:
            warnings.resetwarnings()  # as in a process of its own: a plug-in's warnings are no errors
            outcome = launch(*arguments)
        finally:
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(outcome, stream)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        outcome = pickle.load(stream)
    os.waitpid(child, 0)
    return outcome
