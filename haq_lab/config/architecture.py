"""Refuse a model of an unknown architecture by its config.json, before torch is imported or weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from haq_lab.models.families.lookup import GENERIC, check_model_type

HUB_MODEL = "haq_lab.models.sources.HubModel"


def refuse_unknown_architecture(config: DictConfig) -> None:
    """Check a model that is a folder, or in the hub's cache.

    Models whose config.json is not on this machine or cannot be read are checked later.

    Args:
        config: The composed config of a run.

    Raises:
        UserError: The architecture is not in the family table.
    """
    model: Any = OmegaConf.to_container(config).get("model")  # type: ignore[union-attr]
    if not isinstance(model, dict) or model.get("_target_") != HUB_MODEL or model.get("family") == GENERIC:
        return
    path = _config_file(model)
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return
    if isinstance(fields, dict) and "model_type" in fields:
        check_model_type(fields["model_type"])


def _config_file(model: dict[str, Any]) -> Path | None:
    """Return the model's config.json on this machine, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, revision = str(model.get("name", "")), model.get("revision")
    if (folder := Path(name).expanduser()).is_dir():
        return folder / "config.json"
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
