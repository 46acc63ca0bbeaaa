"""Load and save this machine's measured profile, `local`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import yaml

from haq_lab.hardware.spec import Hardware, cited_hardware, load_hardware
from haq_lab.utils.atomic_files import write_text
from haq_lab.utils.errors import UserError, invalid
from haq_lab.utils.paths import cache_folder


def local_path() -> Path:
    """Return the path of this machine's profile."""
    return cache_folder() / "hardware" / "local.yaml"


def hardware(name: str) -> Hardware:
    """Load a hardware profile.

    Args:
        name: Name of a file in `conf/hardware`, or `local` for this machine.

    Raises:
        UserError: The name is unknown, or `local` has not been measured yet.
    """
    if name in cited_hardware():
        return load_hardware(name)
    if name != "local":
        raise invalid("hardware", name, [*cited_hardware(), "local"])
    return local()


def local() -> Hardware:
    """Load this machine's profile.

    Raises:
        UserError: It has not been measured yet, or its file is damaged.
    """
    again = "Run `python -m haq_lab.offload profile`."
    if not local_path().is_file():
        raise UserError(f"hardware: 'local' has not been measured yet. {again}")
    try:
        return Hardware(**yaml.safe_load(local_path().read_text(encoding="utf-8")) | {"from_disk": True})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"hardware: '{local_path()}' is not a hardware profile ({error}). {again}") from error


def save_local(profile: Hardware) -> Path:
    """Save a profile as `local`.

    Args:
        profile: Measured profile of this machine.

    Returns:
        The path of the file.
    """
    write_text(local_path(), yaml.safe_dump(asdict(profile), sort_keys=False))
    return local_path()
