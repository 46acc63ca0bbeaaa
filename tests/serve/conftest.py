"""Servers of a dense model and of one with offloading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import TINY, launch


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory) -> Callable[[str], Path]:
    """Writes an RTN checkpoint of a tiny model, once."""
    written: dict[str, Path] = {}

    def write(architecture: str) -> Path:
        if architecture not in written:
            folder = tmp_path_factory.mktemp(architecture)
            where = [f"checkpoint.dir={folder / 'tiny'}", f"hydra.run.dir={folder / 'run'}", "measure=[]", "data=[]"]
            outcome = launch(*TINY[:5], f"model=tiny_{architecture}", "tracking=none", *where)
            assert outcome.code == 0, outcome.err
            written[architecture] = folder / "tiny"
        return written[architecture]

    return write


@pytest.fixture(scope="module")
def dense(checkpoint_of) -> Iterator[Any]:
    """A tiny Llama."""
    from serving import serving

    with serving(checkpoint_of("llama")) as served:
        yield served


@pytest.fixture(scope="module")
def sparse(checkpoint_of) -> Iterator[Any]:
    """A tiny Mixtral with half of its experts in the fast tier."""
    from serving import serving

    with serving(checkpoint_of("mixtral"), offload="haq", budget="50%", spare=2) as served:
        yield served
