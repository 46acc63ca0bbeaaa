"""Validate a composed Hydra config and create its objects.

The config of each group names a class by `_target_`. This class is a pydantic dataclass, so its fields define the
allowed types, ranges and values. The whole config is validated before the first class is called.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import ValidationError

from haq_lab.calibration.dataset import Calibration
from haq_lab.checkpoint.model import QuantizedCheckpoint
from haq_lab.config.help import GROUPS, KNOWN, MULTIPLE_CHOICE, options, settings_of
from haq_lab.hardware.spec import Hardware
from haq_lab.int8.backend import Backend
from haq_lab.measure.base import Measure
from haq_lab.models.sources import ModelSource
from haq_lab.offload.settings import Offload
from haq_lab.quantizers.base import Quantizer
from haq_lab.result_cache.settings import ResultCache
from haq_lab.results.old_names import SETTINGS
from haq_lab.tracking.tracker import Tracker
from haq_lab.utils.errors import UserError, invalid, nearest
from haq_lab.utils.paths import bundled

# A nested `_target_` must be a public class of this project. `__main__` modules run commands when imported.
_PROJECT_TARGET = re.compile(r"haq_lab(\.[A-Za-z]\w*)+")


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
    checkpoint: Path | None
    offload: Offload | None
    hardware: Hardware | None
    result_cache: ResultCache


@dataclass(frozen=True)
class _ObjectSpec:
    """A validated config node: a constructor and its arguments. An argument can be a nested `_ObjectSpec`."""

    setting: str
    target: str
    constructor: Callable[..., Any]
    arguments: dict[str, Any]


def effective(config: DictConfig) -> DictConfig:
    """Return a copy of the config without the settings of groups that are set to `none`."""
    config = config.copy()
    for group in _disabled_groups(config):
        config[group] = {"_target_": None}
    return config


def refuse_idle(config: DictConfig, overrides: Sequence[str], sweep: bool) -> None:
    """Raise an error if a setting belongs to a group that is set to `none`; it would be ignored.

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
                raise UserError(f"{given}: there is no such setting{nearest(setting, known)}")
            if not (sweep and group in names):
                others = ", ".join(option for option in options(group) if option != "none")
                raise UserError(
                    f"{given} has no effect because {group}=none. "
                    f"Choose {group}=OPTION, where OPTION is one of {others}."
                )


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
    _refuse_foreign_targets(config)
    groups = ("model", "quantizer", "offload", "hardware", "backend", "calibration", "tracking", "result_cache")
    specs = {group: _specify(config.get(group), group) for group in groups}
    data_specs, measure_specs = _specify_chosen(config, "data"), _specify_chosen(config, "measure")

    model = _create(specs, "model", ModelSource)
    quantizer = _create(specs, "quantizer", Quantizer, optional=True)
    quantized = isinstance(model, QuantizedCheckpoint)
    if quantizer is not None and quantized:
        raise UserError("quantizer: the model of model=quantized is already quantised. Choose quantizer=none.")
    offload = _create(specs, "offload", Offload, optional=True)
    hardware = _create(specs, "hardware", Hardware, optional=True)
    if offload is None and hardware is not None:
        raise UserError(
            f"hardware: '{hardware.name}' has no effect because offload=none. Choose offload=haq or hardware=none."
        )
    backend = _create(specs, "backend", Backend)
    if offload is not None:
        offload.must_suit(backend.device, quantizer is not None or quantized)
    data = {name: _construct(spec) for name, spec in data_specs.items()}
    measures = {name: _construct(spec) for name, spec in measure_specs.items()}
    for name, measure in measures.items():
        if measure.evaluates and not data:
            raise UserError(f"data: measure={name} needs a text. Choose one or more of {', '.join(options('data'))}.")
    tracker = _create(specs, "tracking", Tracker, optional=True)
    return Experiment(
        model=model,
        quantizer=quantizer,
        backend=backend,
        calibration=_create(specs, "calibration", Calibration),
        data=data,
        measures=measures,
        trackers=[] if tracker is None else [tracker],
        offload=offload,
        hardware=hardware,
        result_cache=_create(specs, "result_cache", ResultCache),
        checkpoint=_checkpoint_folder(config.get("checkpoint"), quantizer),
    )


def model_option(name: str, settings: Sequence[str]) -> ModelSource:
    """Create the model of an option of the group `model`, outside a run.

    Args:
        name: The option, such as `tiny_llama`.
        settings: Overrides of the form `model.SETTING=VALUE`.

    Returns:
        The model source.

    Raises:
        UserError: There is no such option, or a setting is not valid.
    """
    if name not in options("model"):
        raise invalid("model", name, options("model"))
    with initialize_config_dir(str(bundled("conf").resolve()), version_base="1.3"):
        return build(compose("config", [f"model={name}", *settings])).model


def _check_names(config: DictConfig) -> None:
    """Check the names at the top of the config, and `force`."""
    for name in map(str, config):
        if name in SETTINGS:
            raise UserError(f"{name}: there is no such setting any more. Use {SETTINGS[name]}.")
        if name not in KNOWN:
            raise UserError(f"there is no group or setting '{name}'{nearest(name, KNOWN)}")
    if not isinstance(config.force, bool):
        raise invalid("force", config.force, ["true", "false"])


def _refuse_foreign_targets(config: DictConfig) -> None:
    """Raise an error if a nested `_target_` is not a class of this project. Nothing is imported.

    The `_target_` of a group itself may be any class, because the user names it as a plug-in.
    """
    for path, target in _targets(OmegaConf.to_container(config, resolve=True), ()):
        depth_of_group = 2 if path[:1] and path[0] in MULTIPLE_CHOICE else 1  # `data.NAME`, but `quantizer`
        nested = len(path) != depth_of_group
        if nested and target is not None and not _PROJECT_TARGET.fullmatch(str(target)):
            raise _foreign_target(".".join(path), target)


def _targets(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the `_target_` of each mapping that has one, at any depth."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value["_target_"]
        for name, inner in value.items():
            yield from _targets(inner, (*path, str(name)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _targets(inner, (*path, str(index)))


def _foreign_target(setting: str, target: Any) -> UserError:
    return UserError(
        f"{setting}._target_: '{target}' is not a class of haq_lab. Only the _target_ of a group itself, such as "
        "quantizer._target_, can name other classes. Remove it."
    )


def _specify_chosen(config: DictConfig, group: str) -> dict[str, _ObjectSpec | None]:
    """Validate the chosen options of a group that takes several. Skip options that an experiment only configures."""
    nodes = dict(config.get(group) or {})
    unchosen = {name for name, node in nodes.items() if "_target_" not in node and name in options(group)}
    return {str(name): _specify(node, f"{group}.{name}") for name, node in nodes.items() if name not in unchosen}


def _specify(node: Any, setting: str) -> _ObjectSpec | None:
    """Validate a node and everything nested in it, without calling a class. None if its `_target_` is null."""
    return _specify_values(_resolve(node, setting), setting, nested=False)


def _resolve(node: Any, setting: str) -> dict[str, Any]:
    """Return a node as a plain dictionary with all interpolations resolved."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(
            f"{setting}: '{node}' is not one of its options. Choose one that `python -m haq_lab --help` lists."
        )
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue:
        missing = sorted(str(name).removeprefix(f"{setting}.") for name in OmegaConf.missing_keys(node))
        name = f"{setting}.{missing[0]}"
        raise UserError(f"{name}: a value is needed. Add {name}=VALUE.") from None


def _specify_values(values: dict[str, Any], setting: str, nested: bool) -> _ObjectSpec | None:
    settings = dict(values)
    target = settings.pop("_target_")
    if target is None:
        return None
    constructor = _import_target(target, f"{setting}._target_")
    if nested and not (inspect.isclass(constructor) and constructor.__module__.split(".")[0] == "haq_lab"):
        raise _foreign_target(setting, target)
    _check_settings(constructor, target, setting, settings)
    arguments = {
        name: _specify_values(value, f"{setting}.{name}", nested=True)
        if isinstance(value, dict) and "_target_" in value
        else value
        for name, value in settings.items()
    }
    return _ObjectSpec(setting, str(target), constructor, arguments)


def _import_target(target: Any, setting: str) -> Any:
    """Import the class or function of a dotted path."""
    module, _, name = str(target).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{setting}: '{target}' cannot be imported ({error}). Name it as module.Class, and check PYTHONPATH."
        ) from error


def _check_settings(constructor: Any, target: Any, setting: str, names: Iterable[str]) -> None:
    """Check setting names against the constructor's parameters, because pydantic ignores unknown names."""
    try:
        parameters = inspect.signature(constructor).parameters
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{setting}._target_: '{target}' does not take settings. Name a dataclass with the settings as fields."
        ) from error
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            new_name = SETTINGS.get(f"{setting}.{name}")
            hint = f" any more. Use {new_name}." if new_name else nearest(name, parameters)
            raise UserError(f"{setting}.{name}: there is no such setting{hint}")


def _create(specs: Mapping[str, _ObjectSpec | None], group: str, kind: Any, optional: bool = False) -> Any:
    """Create the object of a group and check its type. None if the group is optional and set to `none`."""
    spec = specs[group]
    created = _construct(spec)
    if isinstance(created, kind) or (created is None and optional):
        return created
    target = None if spec is None else spec.target
    raise UserError(
        f"{group}._target_: '{target}' is not of the type {kind.__name__}. Choose an option of {group}, "
        "or name a class of this type."
    )


def _construct(spec: _ObjectSpec | None) -> Any:
    """Call the constructors of a spec, nested ones first."""
    if spec is None:
        return None
    arguments = {
        name: _construct(value) if isinstance(value, _ObjectSpec) else value for name, value in spec.arguments.items()
    }
    try:
        return spec.constructor(**arguments)
    except ValidationError as error:
        raise UserError("\n".join(_describe(problem, spec.setting) for problem in error.errors())) from error
    except TypeError as error:
        # A traceback of one frame means that the call itself failed, so the settings are wrong. Others are bugs.
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise UserError(f"{spec.setting}: its settings are not valid ({error}). Correct them.") from error
        raise


def _describe(problem: Any, setting: str) -> str:
    """Turn an error of pydantic into a message that names the setting."""
    path = [str(part) for part in problem["loc"]]
    name = ".".join([setting, *(part for part in path[:1] if part)])
    value, context = problem["input"], problem.get("ctx", {})
    if "expected" in context:
        allowed = re.findall(r"'([^']*)'|(\d+)", context["expected"])
        words = [quoted or number for quoted, number in allowed]
        return f"{name}: '{value}' is not one of {', '.join(words)}{nearest(value, words)}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name}: '{value}' is not valid ({message})"


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
