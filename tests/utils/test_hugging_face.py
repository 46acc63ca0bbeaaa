"""Test that the hub is asked once, and never if the environment forbids it."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import constants

from haq_lab.utils.hugging_face import hub_is_reachable


class Session:
    def __init__(self, answers: bool):
        self.answers, self.asked = answers, 0

    def __call__(self):
        return self

    def head(self, url, timeout):
        self.asked += 1
        if not self.answers:
            raise OSError("unreachable")


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_is_reachable.cache_clear()
    yield
    hub_is_reachable.cache_clear()


@pytest.mark.parametrize("answers", [True, False])
def test_it_is_asked_once(monkeypatch, answers):
    session = Session(answers)
    monkeypatch.setattr(huggingface_hub, "get_session", session)
    assert [hub_is_reachable(), hub_is_reachable()] == [answers, answers]
    assert session.asked == 1


def test_it_is_not_asked_if_the_environment_forbids_it(monkeypatch):
    session = Session(answers=True)
    monkeypatch.setattr(huggingface_hub, "get_session", session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()
    assert session.asked == 0
