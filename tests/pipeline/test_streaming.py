"""Memory does not grow with depth: the benchmark's own measurement, small."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from haq_lab.measure.memory import RESET

SOURCE = Path(__file__).parents[2] / "experiments" / "benchmarks" / "streaming.py"


@pytest.fixture(scope="module")
def streaming():
    spec = importlib.util.spec_from_file_location("streaming", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not RESET.exists(), reason="the peak cannot be reset on this system")
def test_the_same_layer_twelve_times_takes_what_it_takes_twice(streaming, tmp_path):
    rows = streaming.measure([2, 12], 256, 704, "rtn", limit_gb=None, folder=tmp_path)
    peaks = [row["peak_rss_gb"] for row in rows]
    grown = rows[1]["checkpoint_gb"] - rows[0]["checkpoint_gb"]
    assert peaks[1] < 1.1 * peaks[0]
    assert grown > 0.1 * peaks[0], "or it would show nothing"


def test_a_process_that_may_not_have_the_memory_says_so(streaming, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    streaming.write_checkpoint(model, 1, 64, 160)
    with pytest.raises(SystemExit, match="did not end well"):
        streaming.quantise(model, tmp_path / "work", "rtn", limit_gb=0.05)
