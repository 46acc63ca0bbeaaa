"""From a composed Hydra config to checked objects.

Each group's config names a class by `_target_`; the class is a pydantic dataclass, so its fields are the
schema: types, ranges and allowed values are checked here, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import ValidationError

from haq_lab.data.calibration import Calibration
from haq_lab.errors import UserError, nearest
from haq_lab.int8.backend import Backend
from haq_lab.measure.study import Measure
from haq_lab.models.sources import ModelSource
from haq_lab.quantizers.base import Quantizer
from haq_lab.tracking.wandb import Wandb

LONGEST_NAME = 120  # of a folder; file systems stop at 255 bytes


@dataclass(frozen=True)
class Experiment:
    """What the groups of a config stand for."""

    model: ModelSource
    quantizer: Quantizer | None
    backend: Backend
    calibration: Calibration
    data: dict[str, Any]
    measures: dict[str, Measure]
    tracking: Wandb | None


def build(config: DictConfig) -> Experiment:
    """Instantiate every group. Raises `UserError` with the setting's full name for whatever is not valid."""
    data = {name: _object(node, f"data.{name}") for name, node in (config.get("data") or {}).items()}
    measures = {name: _object(node, f"measure.{name}") for name, node in (config.get("measure") or {}).items()}
    return Experiment(
        model=_object(config.model, "model"),
        quantizer=_object(config.quantizer, "quantizer"),
        backend=_object(config.backend, "backend"),
        calibration=_object(config.calibration, "calibration"),
        data=data,
        measures=measures,
        tracking=_object(config.tracking, "tracking"),
    )


def _object(node: DictConfig, setting: str) -> Any:
    try:
        fields: dict[str, Any] = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except MissingMandatoryValue as error:
        raise UserError(f"{setting}.{_last(error.full_key)}: a value is needed") from error
    target = fields.pop("_target_")
    if target is None:
        return None
    try:
        made = get_class(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{setting}._target_: '{target}' cannot be imported ({error})") from error
    try:
        return made(**fields)
    except ValidationError as error:
        raise UserError("\n".join(_told(problem, setting) for problem in error.errors())) from error
    except TypeError as error:
        raise UserError(f"{setting}: {error}") from error


def _last(key: object) -> str:
    return str(key).rpartition(".")[2]


def _told(problem: Any, setting: str) -> str:
    """One of pydantic's findings in our words."""
    path = [str(part) for part in problem["loc"]]
    name = ".".join([setting, *(part for part in path[:1] if part)])
    value, context = problem["input"], problem.get("ctx", {})
    if "expected" in context:
        allowed = re.findall(r"'([^']*)'|(\d+)", context["expected"])
        words = [quoted or number for quoted, number in allowed]
        return f"{name}: '{value}' is not one of {', '.join(words)}{nearest(value, words)}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name}: '{value}' is not valid ({message})"


def folder_name(overrides: str) -> str:
    """A folder name from a job's overrides: readable, without separators, and never too long."""
    name = re.sub(r"[^\w.,=+\-\[\]]+", "-", overrides) or "default"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
