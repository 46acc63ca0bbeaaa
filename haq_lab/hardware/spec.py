"""Describe a machine in a few figures, and load the cited ones from `conf/hardware`."""

from __future__ import annotations

from typing import Annotated

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from haq_lab.utils.errors import invalid
from haq_lab.utils.paths import bundled

Positive = Annotated[float, Field(gt=0)]


@checked(frozen=True)
class Hardware:
    """A machine in a few figures, with where they come from (conf/hardware/)."""

    name: str
    int8_tops: Positive  # dense, 10^12 operations a second; a multiply-add is two
    bandwidth_gbs: Positive  # 10^9 bytes a second
    memory_gb: Positive
    link_gbs: Positive | None  # from the slow tier to the device; None where memory is shared
    host_gbs: Positive  # memory bandwidth of a host that goes with it
    source: str
    from_disk: bool = False  # no GPU: the CPU is the device, a disk the slow tier; figures are reached ones, not peaks


def cited_hardware() -> list[str]:
    """The profiles in cited figures, by name."""
    files = sorted((bundled("conf") / "hardware").glob("*.yaml"))
    return [file.stem for file in files if "int8_tops:" in file.read_text(encoding="utf-8")]


def load_hardware(name: str) -> Hardware:
    """`conf/hardware/<name>.yaml`. Raises `UserError` where there are no figures of that name."""
    if name not in cited_hardware():
        raise invalid("hardware", name, cited_hardware())
    figures = yaml.safe_load((bundled("conf") / "hardware" / f"{name}.yaml").read_text(encoding="utf-8"))
    del figures["_target_"]  # Hydra's
    return Hardware(**figures)
