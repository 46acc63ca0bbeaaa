"""Tell models apart whose labels are equal, such as two folders called `final` or two revisions of one model."""

from __future__ import annotations

import json
from typing import Any

IGNORED = ("_target_", "allow_pickle", "architecture")  # settings that do not change which model is read


def distinct_names(models: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return a name for each model: its label, and what tells it from other models with this label.

    Args:
        models: Label and settings (`config.model`) of each run's model. Equal settings mean the same model.

    Example:
        >>> distinct_names([("final", {"name": "a/final"}), ("final", {"name": "b/final"})])
        ['a/final', 'b/final']
    """
    keys = [json.dumps(settings, sort_keys=True, default=str) for _, settings in models]
    by_label: dict[str, dict[str, dict[str, Any]]] = {}
    for key, (label, settings) in zip(keys, models, strict=True):
        by_label.setdefault(label, {})[key] = settings
    names = {label: _names_within(label, settings) for label, settings in by_label.items()}
    return [names[label][key] for key, (label, _) in zip(keys, models, strict=True)]


def _names_within(label: str, settings: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Names of the models that share a label, by their keys."""
    if len(settings) == 1:
        return dict.fromkeys(settings, label)
    differing = sorted(
        name
        for name in {name for one in settings.values() for name in one}
        if len({str(one.get(name)) for one in settings.values()}) > 1 and name not in IGNORED
    )
    paths = _shortest([str(one.get("name") or one.get("path") or "") for one in settings.values()])
    named = {}
    for (key, one), path in zip(settings.items(), paths, strict=True):
        others = [f"{name}={one.get(name)}" for name in differing if name not in ("name", "path")]
        named[key] = " ".join([path or label, *others])
    return named


def _shortest(paths: list[str]) -> list[str]:
    """Return the shortest ends of paths that tell different paths apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(one[-length:]) for one in parts]
        if len({*ends}) == len({*paths}):
            return ends
    return paths
