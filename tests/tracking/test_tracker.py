"""What trackers receive: ratios with intervals, and nothing private if the user wants it so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from haq_lab.tracking.run_folder import RunFolder
from haq_lab.tracking.tracker import RunRecord, flat_settings, perplexity_ratios, track_run


class Recorder:
    """A tracker that keeps what it receives."""

    def __init__(self) -> None:
        self.seen: dict = {"artifacts": []}

    def start(self, folder, name, group):
        self.seen |= {"config": folder.config, "name": name, "group": group}

    def metrics(self, values):
        self.seen["metrics"] = dict(values)

    def table(self, name, content):
        pass

    def figure(self, path):
        pass

    def artifact(self, path, kind):
        self.seen["artifacts"].append(path)

    def finish(self):
        self.seen["finished"] = True


RECORD = RunRecord(
    "model.name=/home/me/secret", "/home/me/runs", {"kl.x": 0.5}, {}, artifacts={Path("/home/me/manifest.json"): "c"}
)


def test_a_private_run_has_a_random_name_and_no_settings_group_or_manifest(tmp_path):
    folder, tracker = RunFolder(tmp_path, {"model": {"name": "/home/me/secret"}}), Recorder()
    track_run([tracker], folder, RECORD, private=True)
    assert tracker.seen["finished"]
    assert "/home/me" not in repr(tracker.seen)
    assert tracker.seen["metrics"] == {"kl.x": 0.5}
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["run"]) == ("tracked_as", tracker.seen["name"])
    assert folder.config == {"model": {"name": "/home/me/secret"}}  # the run's own record is whole


def test_other_runs_are_sent_whole(tmp_path):
    tracker = Recorder()
    track_run([tracker], RunFolder(tmp_path, {"a": 1}), RECORD)
    assert tracker.seen["config"] == {"a": 1}
    assert (tracker.seen["name"], tracker.seen["group"]) == (RECORD.name, RECORD.group)
    assert tracker.seen["artifacts"] == [Path("/home/me/manifest.json")]
    assert not (tmp_path / "events.jsonl").exists()


def test_ratios_are_exponentials_of_the_paired_differences():
    metrics = {
        "dlnppl.c4": 0.02,
        "dlnppl.c4.low": -0.01,
        "dlnppl.c4.high": 0.05,
        "dlnppl.c4.stderr": 0.01,
        "kl.c4": 9.0,
    }
    ratios = perplexity_ratios(metrics)
    assert ratios == {
        "perplexity_ratio.c4": pytest.approx(1.0202013),
        "perplexity_ratio.c4.low": pytest.approx(0.9900498),
        "perplexity_ratio.c4.high": pytest.approx(1.0512711),
    }


def test_settings_have_their_full_names():
    assert flat_settings({"a": {"b": {"c": 1}, "d": [1]}, "e": None}) == {"a.b.c": 1, "a.d": [1], "e": None}
