"""Without a terminal, progress is one line a stage with its time."""

from __future__ import annotations

import contextlib
import io

import pytest

from haq_lab.utils import console
from haq_lab.utils.console import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by one second whenever it is read."""
    readings = iter(range(1000))
    monkeypatch.setattr(console.time, "perf_counter", lambda: float(next(readings)))


def test_each_stage_is_a_line_with_its_time(clock):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), Progress() as progress:
        progress.stage("model [tiny]")
        progress.layers(2, "quantise")
        progress.layer_done()
        progress.layer_done()
    assert out.getvalue() == "model [tiny]: 1.0 s\nquantise: 1.0 s\n"


def test_a_stage_that_fails_has_no_time(clock):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(ValueError), Progress() as progress:
        progress.stage("model")
        progress.stage("quantise")
        raise ValueError("broken")
    assert out.getvalue() == "model: 1.0 s\n"
