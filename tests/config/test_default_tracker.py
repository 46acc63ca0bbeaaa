"""Without W&B, the default tracks nothing; a tracker that the user names is refused in one line."""

from __future__ import annotations

import importlib.util

import pytest
from launching import TINY, launch

from haq_lab.config.build import _say_untracked, build
from haq_lab.config.compose import compose_run
from haq_lab.utils.errors import UserError

UNTRACKED = [setting for setting in TINY if not setting.startswith("tracking")]
MISSING = "needs the package 'wandb', which is not installed. Run: pip install 'haq-lab[wandb]'"


@pytest.fixture
def no_wandb(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    _say_untracked.cache_clear()


def test_the_default_is_left_out_and_one_line_says_so(no_wandb, tmp_path):
    outcome = launch(*UNTRACKED, f"hydra.run.dir={tmp_path / 'run'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("pip install") == 1
    assert "W&B is not installed, so it gets no copy of this run. Run: pip install 'haq-lab[wandb]'" in outcome.out
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_sweep_says_so_once(no_wandb, tmp_path):
    outcome = launch("-m", *UNTRACKED, "quantizer=none,rtn", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("W&B is not installed") == 1
    assert len([*(tmp_path / "sweep").rglob("results.json")]) == 2


@pytest.mark.parametrize("option", ["online", "offline"])
def test_a_named_tracker_is_refused(option, no_wandb, tmp_path):
    outcome = launch(*UNTRACKED, f"tracking={option}", f"hydra.run.dir={tmp_path / 'run'}")
    assert (outcome.code, outcome.err) == (2, f"haq_lab: tracking={option} {MISSING}\n")


def test_private_is_true_or_false():
    with pytest.raises(UserError, match=r"tracking.private: 'yes' is not one of true, false"):
        build(compose_run([*TINY, "tracking.private='yes'"])[0])
