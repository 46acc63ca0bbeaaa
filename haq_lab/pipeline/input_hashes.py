"""Hash the files that a run reads, so that a finished run is repeated if one of them has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from haq_lab.storage.weight_files import SUFFIXES, weight_files
from haq_lab.utils.atomic_files import cached_sha256
from haq_lab.utils.errors import UserError


def input_hashes(config: dict[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each local file or folder that a config names, by the name of the setting.

    A model folder counts with the weight files that are read and with all its other files, such as the tokenizer.
    Models and texts of the hub are not included.

    Args:
        config: The resolved config of a run.

    Example:
        >>> input_hashes({"data": {"c4": {"path": "c4.jsonl"}}})  # doctest: +SKIP
        {'data.c4.path': '5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef'}
    """
    return {setting: _hash(place) for setting, place in _places(config)}


def changed_inputs(recorded: list[str], config: dict[str, Any]) -> list[str]:
    """Return the settings whose files differ from those that a finished run has recorded.

    Args:
        recorded: `SETTING SHA256` of each input, as in `results.json`. A run of an older version has none.
        config: The resolved config of the run that is about to start.
    """
    before = dict(entry.rsplit(" ", 1) for entry in recorded)
    now = input_hashes(config) if before else {}
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _places(config: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """The settings that name an existing file or folder."""
    named = {"model.name": config.get("model", {}), "model.path": config.get("model", {})}
    named |= {f"data.{name}.path": one for name, one in (config.get("data") or {}).items()}
    named |= {"calibration.path": config.get("calibration", {}), "offload.profile": config.get("offload", {})}
    for setting, settings in named.items():
        value = settings.get(setting.rpartition(".")[2]) if isinstance(settings, dict) else None
        if isinstance(value, str) and value and (place := Path(value).expanduser()).exists():
            yield setting, place


def _hash(place: Path) -> str:
    if place.is_file():
        return cached_sha256(place)
    try:
        weights = weight_files(place).read
    except UserError:  # a folder of texts, or a checkpoint whose files have other names
        weights = [path for path in place.glob("*") if path.suffix in SUFFIXES]
    others = [path for path in place.rglob("*") if path.suffix not in SUFFIXES and path.is_file()]
    files = sorted({*weights, *others})
    lines = "".join(f"{path.relative_to(place)} {cached_sha256(path)}\n" for path in files)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()
