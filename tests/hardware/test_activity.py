"""The share of others follows from the system's counters, and waiting ends at a quiet moment."""

from __future__ import annotations

import time
from types import SimpleNamespace

import psutil
import pytest

from haq_lab.hardware import activity
from haq_lab.hardware.activity import Observation, observe, others_share, wait_until_quiet


def test_others_used_what_this_process_did_not():
    before, after = Observation(100, 200, 50, None), Observation(107, 220, 52, None)
    assert others_share(before, after) == pytest.approx(5 / 20)
    assert others_share(before, before) is None
    assert others_share(before, after._replace(own=80)) == 0, "the system's counters are coarse"
    assert others_share(before, after._replace(busy=400)) == 1


def test_the_counters_are_those_of_the_system(monkeypatch, tmp_path):
    times = {"user": 10.0, "nice": 1.0, "system": 2.0, "idle": 30.0, "iowait": 4.0, "irq": 0.5, "softirq": 0.5}
    times |= {"steal": 2.0, "guest": 7.0}  # `user` contains `guest`
    process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=3.0, system=1.0))
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(**times))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(activity, "THROTTLING", tmp_path)
    assert observe() == Observation(16.0, 50.0, 4.0, None)
    for core, count in enumerate((2, 5)):
        folder = tmp_path / f"cpu{core}" / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")
    assert observe().throttled == 7


def test_the_description_leaves_out_what_the_system_does_not_tell(monkeypatch):
    before, after = Observation(0, 0, 0, 3), Observation(6, 10, 2, 5)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1.5, 1.0, 0.5))
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=2100.0))
    told = activity.activity(before, after)
    assert told == {"others_share": 0.4, "load_1min": 1.5, "cpu_mhz": 2100.0, "throttled": 2.0}

    def refuse():
        raise OSError

    monkeypatch.setattr(psutil, "getloadavg", refuse)
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    assert activity.activity(before, after._replace(throttled=None)) == {"others_share": 0.4}


def _wait(monkeypatch, shares: list[float], seconds: float) -> tuple[float, list[float]]:
    """Wait on a machine on which others use one of `shares` in each second. Return the time and what was reported."""
    clock, busy, reported = [0.0], [0.0], []

    def sleep(given: float) -> None:
        busy[0] += 2 * given * shares[int(clock[0])]  # two processors
        clock[0] += given

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(activity, "observe", lambda: Observation(busy[0], 2 * clock[0], 0.0, None))
    return wait_until_quiet(seconds, reported.append), reported


def test_waiting_ends_at_the_first_quiet_second_or_with_the_time(monkeypatch):
    waited, reported = _wait(monkeypatch, [0.5, 0.4, 0.05, 0.9], 60)
    assert (waited, reported) == (3, pytest.approx([0.5, 0.4]))
    waited, reported = _wait(monkeypatch, [0.5] * 9, 2.5)
    assert (waited, len(reported)) == (2.5, 3)
    assert _wait(monkeypatch, [0.5], 0) == (0, [])
