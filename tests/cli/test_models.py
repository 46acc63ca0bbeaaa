"""`python -m haq_lab.models build NAME` builds a model, checks it and prints its folder."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
from hydra.core.global_hydra import GlobalHydra

from haq_lab.cli import models as command


def _run(capsys, *arguments: str) -> tuple[int, str]:
    GlobalHydra.instance().clear()
    code = 0
    with mock.patch.object(sys, "argv", ["models", "build", *arguments]):
        try:
            command.main()
        except SystemExit as end:
            code = int(end.code or 0)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_it_builds_and_checks(capsys, monkeypatch):
    monkeypatch.setattr("haq_lab.zoo.sanity_check.SEQLEN", 64)
    small = ["layers=1", "hidden=32", "experts=2", "vocabulary=257", "steps=1", "batch=1", "seqlen=16"]
    code, text = _run(capsys, "tiny_mixtral_trained", *[f"model.{setting}" for setting in small])
    assert code == 0
    assert "untrained: perplexity" in text
    assert "after 1 steps: perplexity" in text
    assert "tiny_mixtral_trained: " in text


def test_it_needs_no_tracker(capsys, monkeypatch):
    """`make demo` builds the model before anything else, and W&B is not installed with the core."""
    monkeypatch.setattr("haq_lab.utils.extras.installed", lambda *packages: False)
    code, text = _run(capsys, "tiny_llama")
    assert code == 0, text
    assert any(line.startswith("tiny_llama: ") for line in text.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smol_mo"], "did you mean 'smol_moe'"),
        (["tiny_mixtral_trained", "model.steps=-1"], "model.steps: '-1' is not valid"),
        (["smol_moe", "model.active=9"], "model.active: 9 is more than the 8"),
        (["tiny_llama", "model.layer=3"], "model.layer: there is no such setting in the options chosen (did you mean"),
        (["tiny_llama", "modl.layers=3"], "modl.layers: there is no such group or setting (did you mean 'model'?)"),
    ],
)
def test_wrong_input_is_reported(capsys, arguments, message):
    code, text = _run(capsys, *arguments)
    assert code == 2
    assert message in text
