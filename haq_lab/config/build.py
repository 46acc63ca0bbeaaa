"""Validate a composed Hydra config and create the objects of a run.

The config of each group names a class by `_target_`. This class is a pydantic dataclass, so its fields define the
allowed types, ranges and values. The whole config is validated before the first class is called.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from haq_lab.calibration.dataset import Calibration
from haq_lab.checkpoint.model import QuantizedCheckpoint
from haq_lab.config.explain import unknown_group, unknown_option
from haq_lab.config.help import FOR_ALL, GROUPS, KNOWN, MULTIPLE_CHOICE, options, settings_of
from haq_lab.config.object_specs import ObjectSpec, refuse_foreign_targets, specify
from haq_lab.config.override_syntax import override_value, spelling_of_path
from haq_lab.hardware.spec import Hardware
from haq_lab.int8.backend import Backend
from haq_lab.measure.base import Measure, needs_reference
from haq_lab.models.sources import ModelSource
from haq_lab.offload.settings import Offload
from haq_lab.quantizers.base import Quantizer
from haq_lab.result_cache.settings import ResultCache
from haq_lab.results.old_names import SETTINGS
from haq_lab.tracking.tracker import Tracker
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError, invalid, renamed, unknown_setting
from haq_lab.utils.extras import installed
from haq_lab.utils.paths import bundled


@dataclass(frozen=True)
class Experiment:
    """All objects that one run needs, created from its config."""

    model: ModelSource
    quantizer: Quantizer | None
    backend: Backend
    calibration: Calibration
    data: dict[str, Any]
    measures: dict[str, Measure]
    trackers: list[Tracker]
    private: bool
    checkpoint: Path | None
    offload: Offload | None
    hardware: Hardware | None
    result_cache: ResultCache


def without_disabled_groups(config: DictConfig) -> DictConfig:
    """Return a copy of the config without the settings of groups that are set to `none`."""
    config = config.copy()
    for group in _disabled_groups(config):
        config[group] = {"_target_": None}
    return config


def refuse_ignored_settings(config: DictConfig, overrides: Sequence[str], sweep: bool) -> None:
    """Raise UserError if a setting belongs to a group that is set to `none`; it would be ignored.

    A sweep over `offload=none,haq` may set `offload.budget=40%`, because this setting is meant for the job with
    `offload=haq`. A setting that no option of the group has is refused in a sweep too.

    Args:
        config: The composed config.
        overrides: The overrides of the command line, such as `offload.budget=40%`.
        sweep: Whether the run is a job of a sweep.

    Raises:
        UserError: A setting would be ignored, or no option of the group has it.
    """
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for group in _disabled_groups(config):
        known = sorted({name for option in options(group) for name in settings_of(group, option)})
        for given in (name for name in names if name.startswith(f"{group}.")):
            setting = given.split(".")[1]
            if setting == "_target_":
                continue
            if setting not in known:
                raise unknown_setting(given, known)
            if not (sweep and group in names):
                others = ", ".join(option for option in options(group) if option != "none")
                raise UserError(
                    f"{given} has no effect because {group}=none. "
                    f"Choose {group}=OPTION, where OPTION is one of {others}."
                )


def without_default_tracker(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a config without the default tracker if W&B is not installed. A tracker that the user names is kept.

    Args:
        config: The composed config.
        overrides: The overrides of the command line.
    """
    named = any(re.match(r"[+~]*tracking(\.offline)?[.=]", override) for override in overrides)
    if named or "offline" not in (config.get("tracking") or {}) or installed("wandb"):
        return config
    _say_untracked()
    config = config.copy()
    del config.tracking.offline
    return config


@cache  # the runs of a sweep share a process
def _say_untracked() -> None:
    say("tracking: W&B is not installed, so it gets no copy of this run. Run: pip install 'haq-lab[wandb]'")


def _disabled_groups(config: DictConfig) -> list[str]:
    """Return the groups that are set to `none`, whose `_target_` is null."""
    nodes = {group: config.get(group) for group in GROUPS}
    return [group for group, node in nodes.items() if isinstance(node, DictConfig) and node.get("_target_", "") is None]


def build(config: DictConfig) -> Experiment:
    """Validate a composed config and create the objects of all its groups.

    No class is called before the whole config is validated: its names, every `_target_` and the settings of each class.
    Types and ranges are checked by the classes themselves.

    Args:
        config: The composed config, for example `hydra.compose("config", ["model=tiny_llama"])`.

    Returns:
        The objects of the run.

    Raises:
        UserError: A setting is not valid, or two settings do not suit each other. The message names the setting.
    """
    _check_names(config)
    refuse_foreign_targets(config)
    groups = ("model", "quantizer", "offload", "hardware", "backend", "calibration", "result_cache")
    specs = {group: specify(config.get(group), group) for group in groups}
    chosen = {group: _specify_chosen(config, group) for group in MULTIPLE_CHOICE}

    model = _create(specs["model"], "model", ModelSource)
    quantizer = _create_optional(specs["quantizer"], Quantizer)
    quantized = isinstance(model, QuantizedCheckpoint)
    if quantizer is not None and quantized:
        raise UserError("quantizer: the model of model=quantized is already quantised. Choose quantizer=none.")
    offload = _create_optional(specs["offload"], Offload)
    hardware = _create_optional(specs["hardware"], Hardware)
    if offload is None and hardware is not None:
        raise UserError(
            f"hardware: '{hardware.name}' has no effect because offload=none. Choose offload=haq or hardware=none."
        )
    data = {name: spec.create() for name, spec in chosen["data"].items()}
    measures = {name: spec.create() for name, spec in chosen["measure"].items()}
    _check_measures(measures, bool(data), quantized)
    calibration = _create(specs["calibration"], "calibration", Calibration)
    trackers = [spec.create(Tracker) for spec in chosen["tracking"].values()]
    result_cache = _create(specs["result_cache"], "result_cache", ResultCache)
    checkpoint = _checkpoint_folder(config.get("checkpoint"), quantizer)
    backend = _create(specs["backend"], "backend", Backend)  # last, because it can reserve a GPU
    if offload is not None:
        try:
            offload.must_suit(backend.device, quantizer is not None or quantized)
        except UserError:
            backend.close()
            raise
    return Experiment(
        model=model,
        quantizer=quantizer,
        backend=backend,
        calibration=calibration,
        data=data,
        measures=measures,
        trackers=trackers,
        private=_is_private(config),
        checkpoint=checkpoint,
        offload=offload,
        hardware=hardware,
        result_cache=result_cache,
    )


def _check_measures(measures: dict[str, Measure], has_data: bool, quantized: bool) -> None:
    """Check that the run has what its measures need: a text, and weights in full precision."""
    for name, measure in measures.items():
        if measure.evaluates and not has_data:
            raise UserError(f"data: measure={name} needs a text. Choose one or more of {', '.join(options('data'))}.")
        if needs_reference(measure) and quantized:
            raise UserError(
                f"measure.{name}.against: none has no effect because the checkpoint of model=quantized has no weights "
                f"in full precision. Choose measure.{name}.against=null."
            )


def make_trackers(config: DictConfig) -> list[Tracker]:
    """Create the trackers of a config.

    Raises:
        UserError: A setting is not valid, or the package of a tracker is not installed.
    """
    return [spec.create(Tracker) for spec in _specify_chosen(config, "tracking").values()]


def model_option(name: str, settings: Sequence[str]) -> ModelSource:
    """Create the model of an option of the group `model`, of a folder or of a hub name, outside a run.

    Args:
        name: The option, such as `tiny_llama`, the folder of a model or of a quantised checkpoint, or a hub name.
        settings: Overrides of the form `model.SETTING=VALUE`.

    Returns:
        The model source.

    Raises:
        UserError: There is no such option, or a setting is not valid.
    """
    if name not in options("model"):
        if (spelling := spelling_of_path("model", name)) is None:
            raise unknown_option("model", name)
        settings = [f"{spelling.setting}={override_value(name)}", *settings]
        name = spelling.option.removeprefix("model=")
    with initialize_config_dir(str(bundled("conf").resolve()), version_base="1.3"):
        return build(compose("config", [f"model={name}", "tracking=none", *settings])).model


def _check_names(config: DictConfig) -> None:
    """Check the names at the top of the config and in groups that take several options, and `force`."""
    several = {group: config.get(group) for group in MULTIPLE_CHOICE}
    chosen = [
        f"{group}.{name!s}" for group, nodes in several.items() if isinstance(nodes, DictConfig) for name in nodes
    ]
    for name in [*map(str, config), *chosen]:
        if name in SETTINGS:
            raise renamed(name, SETTINGS[name])
    for name in map(str, config):
        if name not in KNOWN:
            raise unknown_group(name)
    for name, value in (("force", config.force), ("tracking.private", _is_private(config))):
        if not isinstance(value, bool):
            raise invalid(name, value, ["true", "false"])


def _is_private(config: DictConfig) -> bool:
    """Return the setting `tracking.private`, which a config without the group does not have."""
    nodes = config.get("tracking")
    return nodes.get("private", False) if isinstance(nodes, DictConfig) else False


def _specify_chosen(config: DictConfig, group: str) -> dict[str, ObjectSpec]:
    """Validate the chosen options of a group that takes several. Skip options that an experiment only configures."""
    nodes = config.get(group) or {}
    if not isinstance(nodes, DictConfig | dict):
        raise invalid(group, nodes, options(group))
    configured = {str(name) for name, node in nodes.items() if isinstance(node, DictConfig) and "_target_" not in node}
    unchosen = configured & set(options(group))
    skipped = {*unchosen, *FOR_ALL.get(group, [])}
    specs = {str(name): specify(node, f"{group}.{name!s}") for name, node in nodes.items() if name not in skipped}
    return {name: spec for name, spec in specs.items() if spec is not None}


def _create(spec: ObjectSpec | None, group: str, kind: Any) -> Any:
    """Create the object of a group that must have one."""
    if spec is None:
        raise UserError(f"{group}._target_: null is not of the type {kind.__name__}. Choose an option of {group}.")
    return spec.create(kind)


def _create_optional(spec: ObjectSpec | None, kind: Any) -> Any:
    """Create the object of a group, or return None if the group is set to `none`."""
    return None if spec is None else spec.create(kind)


def _checkpoint_folder(node: Any, quantizer: Quantizer | None) -> Path | None:
    """Return the absolute folder for the quantised model. None if it is not written."""
    if not isinstance(node, DictConfig) or "dir" not in node:
        raise UserError(f"checkpoint: '{node}' is not valid. Name the folder with checkpoint.dir=DIR.")
    if node.dir is None:
        return None
    if not str(node.dir):
        raise UserError("checkpoint.dir: '' is not valid. Name a folder, or null to write no checkpoint.")
    if quantizer is None:
        raise UserError(
            f"checkpoint.dir: '{node.dir}' has no effect because quantizer=none. "
            "Choose a quantizer or checkpoint.dir=null."
        )
    return Path(str(node.dir)).expanduser().resolve()
