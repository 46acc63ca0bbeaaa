"""Provide quantised checkpoints of tiny models, written once per session by the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launching import TINY, launch

STATIC = ["quantizer=haq", "quantizer.activations=static"]


@pytest.fixture(scope="session", params=["tiny_opt", "tiny_llama", "tiny_mixtral"])
def written(request, tmp_path_factory) -> Path:
    """Return a run folder with `checkpoint/` and results."""
    folder = tmp_path_factory.mktemp(request.param)
    where = [f"checkpoint.dir={folder / 'checkpoint'}", f"hydra.run.dir={folder / 'run'}"]
    outcome = launch(*TINY, f"model={request.param}", *STATIC, *where)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(written / "checkpoint", tmp_path / "copy"))
