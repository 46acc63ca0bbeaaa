"""Test that a run closes its backend at its end, whether it succeeds or not."""

from __future__ import annotations

import pytest
from launching import TINY, launch

from haq_lab.int8.backend import ReferenceBackend
from haq_lab.utils.errors import UserError

closed: list[str] = []


class Reserving(ReferenceBackend):
    """A backend that reserves something until it is closed."""

    def __init__(self) -> None:
        closed.append("reserved")

    def close(self) -> None:
        closed.append("closed")


@pytest.mark.parametrize("case", ["success", "mistake", "does not suit"])
def test_a_run_closes_its_backend(tmp_path, monkeypatch, case):
    closed.clear()
    arguments = [*TINY, f"hydra.run.dir={tmp_path}", f"backend._target_={__name__}.Reserving"]
    if case == "mistake":
        arguments.append("data.python_docs.seqlen=100000")
    if case == "does not suit":
        arguments += ["offload=haq", "model=tiny_mixtral"]
        monkeypatch.setattr("haq_lab.offload.settings.Offload.must_suit", _refuse)
    done = launch(*arguments)
    assert done.code == (0 if case == "success" else 2), done.err
    assert closed == ["reserved", "closed"]


def _refuse(*arguments: object) -> None:
    raise UserError("offload: it does not suit the backend. Choose offload=none.")
