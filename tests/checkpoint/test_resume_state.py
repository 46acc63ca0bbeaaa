"""A saved state is restored exactly, and a damaged one is one line that names the remedy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haq_lab.calibration.channel_ranges import FILE
from haq_lab.checkpoint.resume_state import RECORD, restore_state, save_state
from haq_lab.quantizers.pass_result import PassResult, PassState
from haq_lab.utils.errors import UserError


def new_state(fill: float) -> PassState:
    hidden = {"text": torch.full((2, 3, 4), fill)}
    return PassState(hidden, PassResult({"text": {"fp": hidden["text"]}}), {"text": 0})


@pytest.fixture
def work(tmp_path):
    state = new_state(1.5)
    state.at["text"] = 4
    state.result.ranges.add("site", torch.ones(4), torch.ones(4))
    save_state(tmp_path, 3, state, [])
    return tmp_path


def test_the_state_is_restored(work):
    state = new_state(0.0)
    assert restore_state(work, state) == []
    assert torch.equal(state.hidden["text"], torch.full((2, 3, 4), 1.5))
    assert state.at == {"text": 4}
    assert len(state.result.ranges.before["site"]) == 1


@pytest.mark.parametrize("name", [RECORD, FILE, "0.bin"])
def test_a_missing_file_is_one_line(work, name):
    (work / "state-00003" / name).unlink()
    with pytest.raises(UserError, match=rf"state-00003.*Remove {work} to start again\.$"):
        restore_state(work, new_state(0.0))


@pytest.mark.parametrize("name", [RECORD, FILE])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80) | st.sampled_from([b"{}", b"[]", b"[" * 5000, b'{"at": 1}']))
def test_any_bytes_are_one_line(work, name, content):
    (work / "state-00003" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"Remove {work} to start again\.$"):
        restore_state(work, new_state(0.0))
