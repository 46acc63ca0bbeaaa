"""From a composed Hydra config to checked objects.

Each group's config names a class by `_target_`; the class is a pydantic dataclass, so its fields are the
schema: types, ranges and allowed values are checked here, before anything is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import ValidationError

from haq_lab.calibration.dataset import Calibration
from haq_lab.checkpoint.model import QuantizedCheckpoint
from haq_lab.config.help import GROUPS, KNOWN, options, settings_of
from haq_lab.hardware.spec import Hardware
from haq_lab.int8.backend import Backend
from haq_lab.measure.base import Measure
from haq_lab.models.sources import ModelSource
from haq_lab.offload.settings import Offload
from haq_lab.quantizers.base import Quantizer
from haq_lab.result_cache.settings import ResultCache
from haq_lab.results.old_names import SETTINGS
from haq_lab.tracking.wandb import Wandb
from haq_lab.utils.errors import UserError, invalid, nearest
from haq_lab.utils.paths import bundled


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
    checkpoint: Path | None
    offload: Offload | None
    hardware: Hardware | None
    result_cache: ResultCache


def effective(config: DictConfig) -> DictConfig:
    """The config without the settings of groups that stand for nothing (`_target_: null`)."""
    config = config.copy()
    for group in _idle(config):
        config[group] = {"_target_": None}
    return config


def refuse_idle(config: DictConfig, overrides: Sequence[str], sweep: bool) -> None:
    """Raise `UserError` where settings are given of a group that stands for nothing: nothing would use them. A job of a
    sweep that chooses the group's option is let through: over `offload=none,haq`, `offload.budget=40%` is meant for the
    other one. Nothing ever uses a setting that no option of the group has.
    """
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for group in _idle(config):
        known = sorted({name for option in options(group) for name in settings_of(group, option)})
        for given in (name for name in names if name.startswith(f"{group}.")):
            setting = given.split(".")[1]
            if setting == "_target_":
                continue
            if setting not in known:
                raise UserError(f"{given}: there is no such setting{nearest(setting, known)}")
            if not (sweep and group in names):
                others = ", ".join(option for option in options(group) if option != "none")
                raise UserError(f"{given}: {group}=none has no use for it; add {group}=OPTION (one of {others})")


def _idle(config: DictConfig) -> list[str]:
    """The groups of which the option `none` is in force."""
    nodes = {group: config.get(group) for group in GROUPS}
    return [group for group, node in nodes.items() if isinstance(node, DictConfig) and node.get("_target_", "") is None]


def build(config: DictConfig) -> Experiment:
    """Instantiate every group. Raises `UserError` with the setting's full name for whatever is not valid."""
    for name in map(str, config):
        if name in SETTINGS:
            raise UserError(f"{name}: there is no such setting any more. Use {SETTINGS[name]}.")
        if name not in KNOWN:
            raise UserError(f"there is no group or setting '{name}'{nearest(name, KNOWN)}")
    if not isinstance(config.force, bool):
        raise invalid("force", config.force, ["true", "false"])
    model = _part(config, "model", ModelSource)
    quantizer = _part(config, "quantizer", Quantizer, optional=True)
    if quantizer is not None and isinstance(model, QuantizedCheckpoint):
        raise UserError("quantizer: model=quantized is quantised already; leave the quantizer out, or quantizer=none")
    offload = _part(config, "offload", Offload, optional=True)
    hardware = _part(config, "hardware", Hardware, optional=True)
    if offload is None and hardware is not None:
        raise UserError(
            f"hardware: '{hardware.name}' is for runs that offload experts; add offload=haq, or hardware=none"
        )
    backend = _part(config, "backend", Backend)
    if offload is not None:
        offload.must_suit(backend.device, quantizer is not None or isinstance(model, QuantizedCheckpoint))
    data, measures = _objects(config, "data"), _objects(config, "measure")
    for name, measure in measures.items():
        if measure.evaluates and not data:
            raise UserError(f"data: measure={name} needs a text; choose one or more of {', '.join(options('data'))}")
    return Experiment(
        model=model,
        quantizer=quantizer,
        backend=backend,
        calibration=_part(config, "calibration", Calibration),
        data=data,
        measures=measures,
        tracking=_part(config, "tracking", Wandb, optional=True),
        offload=offload,
        hardware=hardware,
        result_cache=_part(config, "result_cache", ResultCache),
        checkpoint=_checkpoint(config.get("checkpoint"), quantizer),
    )


def model_option(name: str, settings: Sequence[str]) -> ModelSource:
    """The model that an option of the group `model` stands for, outside a run.

    Args:
        settings: `model.SETTING=VALUE`.

    Raises:
        UserError: There is no such option, or a setting is not valid.
    """
    if name not in options("model"):
        raise invalid("model", name, options("model"))
    with initialize_config_dir(str(bundled("conf").resolve()), version_base="1.3"):
        return build(compose("config", [f"model={name}", *settings])).model


def _checkpoint(node: Any, quantizer: Quantizer | None) -> Path | None:
    """Where the quantised model is to be written, absolute; None for nowhere."""
    if not isinstance(node, DictConfig) or "dir" not in node:
        raise UserError(f"checkpoint: '{node}' is not valid; checkpoint.dir=DIR names the folder")
    if node.dir is None:
        return None
    if not str(node.dir):
        raise UserError("checkpoint.dir: '' is not valid; name a folder, or null")
    if quantizer is None:
        raise UserError("checkpoint.dir: quantizer=none leaves nothing to write; choose a quantizer")
    return Path(str(node.dir)).expanduser().resolve()


def _part(config: DictConfig, group: str, kind: Any, optional: bool = False) -> Any:
    """What a group stands for; None where it may stand for nothing."""
    made = _object(config.get(group), group)
    if isinstance(made, kind) or (made is None and optional):
        return made
    raise UserError(f"{group}._target_: '{config[group]._target_}' makes no {kind.__name__}")


def _objects(config: DictConfig, group: str) -> dict[str, Any]:
    """The chosen options of a group that takes several. An experiment may set up more than are chosen."""
    nodes = dict(config.get(group) or {})
    unchosen = {name for name, node in nodes.items() if "_target_" not in node and name in options(group)}
    return {str(name): _object(node, f"{group}.{name}") for name, node in nodes.items() if name not in unchosen}


def _object(node: Any, setting: str) -> Any:
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(f"{setting}: one of its options is needed, not '{node}'; `python -m haq_lab --help` lists them")
    try:
        fields: dict[str, Any] = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except MissingMandatoryValue:
        missing = sorted(str(name).rpartition(".")[2] for name in OmegaConf.missing_keys(node))
        raise UserError(f"{setting}.{missing[0]}: a value is needed") from None
    target = fields.pop("_target_")
    if target is None:
        return None
    for name, value in fields.items():
        if isinstance(value, dict) and "_target_" in value:
            fields[name] = _object(node[name], f"{setting}.{name}")
    made = _locate(target, f"{setting}._target_")
    try:
        parameters = inspect.signature(made).parameters  # pydantic's classes pass over names that they don't have
    except (TypeError, ValueError) as error:
        raise UserError(f"{setting}._target_: '{target}' is nothing that takes settings") from error
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in fields:
        if name not in parameters and not open_ended:
            now = SETTINGS.get(f"{setting}.{name}")
            hint = f" any more. Use {now}." if now else nearest(name, parameters)
            raise UserError(f"{setting}.{name}: there is no such setting{hint}")
    try:
        return made(**fields)
    except ValidationError as error:
        raise UserError("\n".join(_told(problem, setting) for problem in error.errors())) from error
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # the call itself: wrong settings
            raise UserError(f"{setting}: {error}") from error
        raise


def _locate(target: str, setting: str) -> Any:
    """The class or function that a dotted path names."""
    module, _, name = str(target).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{setting}: '{target}' cannot be imported ({error})") from error


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
