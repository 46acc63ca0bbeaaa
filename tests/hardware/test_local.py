"""Test that published profiles are complete, this machine's can be saved and loaded, and errors suggest a name."""

from __future__ import annotations

import pytest

from haq_lab.hardware.local import hardware, local_path, save_local
from haq_lab.hardware.spec import cited_hardware
from haq_lab.offload.costs import this_machine as profiles
from haq_lab.offload.costs.this_machine import measure_machine
from haq_lab.utils.errors import UserError


@pytest.mark.parametrize("name", cited_hardware())
def test_cited_profiles_say_where_their_figures_come_from(name):
    profile = hardware(name)
    assert not profile.from_disk
    assert profile.link_gbs is None or 0 < profile.link_gbs < profile.bandwidth_gbs
    assert "int8" in profile.source
    assert "host" in profile.source


def test_this_machine_is_measured_kept_and_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path / "cache"))
    for name, size in (("SIZE", 2**16), ("ROWS", 8), ("K", 64)):
        monkeypatch.setattr(profiles, name, size)
    with pytest.raises(UserError, match=r"has not been measured yet\. Run `python -m"):
        hardware("local")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    profile = measure_machine(scratch)
    assert not any(scratch.iterdir())
    assert profile.from_disk
    save_local(profile)
    assert hardware("local") == profile
    local_path().write_text("bandwidth: 3")
    with pytest.raises(UserError, match="is not a hardware profile"):
        hardware("local")


@pytest.mark.parametrize(("name", "nearest"), [("rtx3060_12", "rtx3060_12g"), ("locl", "local")])
def test_an_unknown_name_is_a_mistake(name, nearest):
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        hardware(name)


def test_the_figures_are_operations_and_bytes_a_second(tmp_path, monkeypatch):
    """If a product, a copy and a read take 1 ms each."""
    monkeypatch.setattr(profiles, "_shortest_seconds", lambda work: 1e-3)
    monkeypatch.setattr(profiles, "SIZE", 10**6)
    machine = measure_machine(tmp_path)
    assert machine.int8_tops == pytest.approx(2 * 512 * 2048 * 2048 * 1e3 / 1e12)
    assert (machine.bandwidth_gbs, machine.host_gbs, machine.link_gbs) == pytest.approx((2.0, 2.0, 1.0))
