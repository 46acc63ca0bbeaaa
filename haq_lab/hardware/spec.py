"""Define a machine's specification, and load the published ones from `conf/hardware`."""

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
    """Specification of a machine, with its source.

    Attributes:
        name: Name for tables and figures.
        int8_tops: Dense int8 operations, 10^12 per second. A multiply-add counts as two.
        bandwidth_gbs: Memory bandwidth of the device, 10^9 bytes per second.
        memory_gb: Memory of the device, 10^9 bytes.
        link_gbs: Bandwidth from the slow tier to the device, 10^9 bytes per second. None if they share memory.
        host_gbs: Memory bandwidth of a typical host, 10^9 bytes per second.
        source: Where the figures come from.
        from_disk: Whether the CPU is the device and a disk the slow tier. The figures are then measured, not peaks.
    """

    name: str
    int8_tops: Positive
    bandwidth_gbs: Positive
    memory_gb: Positive
    link_gbs: Positive | None
    host_gbs: Positive
    source: str
    from_disk: bool = False


def cited_hardware() -> list[str]:
    """Return the names of the profiles in `conf/hardware` that have published figures."""
    files = sorted((bundled("conf") / "hardware").glob("*.yaml"))
    return [file.stem for file in files if "int8_tops:" in file.read_text(encoding="utf-8")]


def load_hardware(name: str) -> Hardware:
    """Load `conf/hardware/<name>.yaml`.

    Args:
        name: Name of the profile.

    Raises:
        UserError: There is no profile of that name.
    """
    if name not in cited_hardware():
        raise invalid("hardware", name, cited_hardware())
    figures = yaml.safe_load((bundled("conf") / "hardware" / f"{name}.yaml").read_text(encoding="utf-8"))
    del figures["_target_"]  # the class that Hydra would create
    return Hardware(**figures)
