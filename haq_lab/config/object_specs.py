"""Validate config nodes that name a class by `_target_`, and create the objects of these classes.

`specify` validates a node and everything nested in it without calling a class. `ObjectSpec.create` calls the classes.
So a config can be validated as a whole before the first class is called.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import ValidationError

from haq_lab.config.help import MULTIPLE_CHOICE
from haq_lab.results.old_names import SETTINGS
from haq_lab.utils.errors import UserError, invalid, nearest, renamed, unknown_setting

# A nested `_target_` must be a public class of this project. `__main__` modules run commands when imported.
_PROJECT_TARGET = re.compile(r"haq_lab(\.[A-Za-z]\w*)+")


@dataclass(frozen=True)
class ObjectSpec:
    """A validated config node.

    Attributes:
        setting: Full name of the node, such as `quantizer` or `data.c4`.
        target: Dotted path of the constructor.
        constructor: Class or function that creates the object.
        arguments: Its keyword arguments. An argument can be a nested `ObjectSpec`.
    """

    setting: str
    target: str
    constructor: Callable[..., Any]
    arguments: dict[str, Any]

    def create(self, kind: Any = object) -> Any:
        """Create the object, nested objects first.

        Args:
            kind: Required type of the object.

        Raises:
            UserError: The class refuses a setting, or the object is not of the required type.
        """
        arguments = {
            name: value.create() if isinstance(value, ObjectSpec) else value for name, value in self.arguments.items()
        }
        try:
            created = self.constructor(**arguments)
        except ValidationError as error:
            raise UserError("\n".join(_describe(problem, self.setting) for problem in error.errors())) from error
        except TypeError as error:
            # A traceback of one frame means that the call itself failed, so the settings are wrong. Others are bugs.
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                raise UserError(f"{self.setting}: its settings are not valid ({error}). Correct them.") from error
            raise
        if not isinstance(created, kind):
            group = self.setting.partition(".")[0]
            raise UserError(
                f"{self.setting}._target_: '{self.target}' is not of the type {kind.__name__}. "
                f"Choose an option of {group}, or name a class of this type."
            )
        return created


def refuse_foreign_targets(config: DictConfig) -> None:
    """Check that each nested `_target_` is a class of this project. Nothing is imported.

    The `_target_` of a group itself can be any class, because the user names it as a plug-in. Such a place is
    `quantizer._target_`, and `tracking.NAME._target_` in a group that takes several options.

    Args:
        config: The composed config.

    Raises:
        UserError: A nested `_target_` names another class.
    """
    for path, target in _targets(OmegaConf.to_container(config, resolve=True), ()):
        depth_of_plugin = 2 if path[:1] and path[0] in MULTIPLE_CHOICE else 1  # `data.NAME`, but `quantizer`
        nested = len(path) != depth_of_plugin
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
        f"{setting}._target_: '{target}' is not a class of haq_lab. Remove it. Only the _target_ of a group itself, "
        "such as quantizer._target_ or tracking.NAME._target_, can name other classes."
    )


def specify(node: Any, setting: str) -> ObjectSpec | None:
    """Validate a node and everything nested in it, without calling a class.

    Args:
        node: The config of a group or of one of its options.
        setting: Full name of the node, such as `quantizer` or `data.c4`.

    Returns:
        The specification of the object, or None if `_target_` is null.

    Raises:
        UserError: The node has no `_target_`, or a class or a setting does not exist.
    """
    return _specify_values(_resolve(node, setting), setting, nested=False)


def _resolve(node: Any, setting: str) -> dict[str, Any]:
    """Return a node as a plain dictionary with all interpolations resolved."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(
            f"{setting}: '{node}' is not an option. Choose one that `python -m haq_lab --help` lists, "
            f"or name a class with {setting}._target_=MODULE.CLASS."
        )
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue:
        missing = sorted(str(name).removeprefix(f"{setting}.") for name in OmegaConf.missing_keys(node))
        name = f"{setting}.{missing[0]}"
        raise UserError(f"{name}: a value is needed. Add {name}=VALUE.") from None


def _specify_values(values: dict[str, Any], setting: str, nested: bool) -> ObjectSpec | None:
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
    return ObjectSpec(setting, str(target), constructor, arguments)


def _import_target(target: Any, setting: str) -> Any:
    """Import the class or function of a dotted path."""
    module, _, name = str(target).rpartition(".")
    try:
        found = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module  # not a module that it imports
        hint = nearest(module, [path.stem for path in Path().glob("*.py")]) if missing else ""
        raise UserError(
            f"{setting}: '{target}' cannot be imported ({error}{hint}). Name it as module.Class, and check PYTHONPATH."
        ) from error
    if hasattr(found, name):
        return getattr(found, name)
    classes = [
        one for one, value in vars(found).items() if inspect.isclass(value) and value.__module__.startswith(module)
    ]
    raise UserError(
        f"{setting}: '{target}' cannot be imported: '{module}' has no '{name}'"
        f"{nearest(name, classes) or '. Name it as module.Class.'}"
    )


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
            if new_name := SETTINGS.get(f"{setting}.{name}"):
                raise renamed(f"{setting}.{name}", new_name)
            raise unknown_setting(f"{setting}.{name}", parameters)


def _describe(problem: Any, setting: str) -> str:
    """Turn an error of pydantic into a message that names the setting, its value and the rule."""
    parameter = str(problem["loc"][0]) if problem["loc"] else ""
    name = f"{setting}.{parameter}" if parameter else setting
    value, context = problem["input"], problem.get("ctx", {})
    if "expected" in context:
        choices = re.findall(r"'([^']*)'|(\d+)", context["expected"])
        return str(invalid(name, value, [quoted or number for quoted, number in choices]))
    rule = problem["msg"].replace("Input should be", "It must be").removeprefix("Value error, ").rstrip(".")
    return f"{name}: '{value}' is not valid. {rule[0].upper()}{rule[1:]}."
