"""The tables of all settings: defaults and comments from `conf/`, types and ranges from the classes they configure."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import griffe
from omegaconf import OmegaConf

from docs.tools.tables import code, table
from haq_lab.config.help import GROUPS, MULTIPLE_CHOICE, options
from haq_lab.tracking.tracker import flat_settings
from haq_lab.utils.paths import bundled

SWEEPS = {
    "hydra/launcher": "how the jobs of a sweep run",
    "hydra/sweeper": "how a sweep chooses its jobs",
}
PREFIXES = {"hydra/launcher": "hydra.launcher", "hydra/sweeper": "hydra.sweeper"}
MANY = 3  # a setting with more defaults than this has a column in the table of the options
CHOICES = re.compile(r"^[\w\"\[\] ]+( \| [\w\"\[\] ]+)+(: |$)")  # a comment's list of values, which the types repeat
WORDS = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", Path: "path", dict: "settings"}


class Setting(NamedTuple):
    """One setting of one option."""

    default: str
    values: str
    meaning: str


def settings() -> str:
    """Return a section for each group, and one for the settings outside the groups."""
    sections = [_group(group, about) for group, about in (GROUPS | SWEEPS).items()]
    return "\n\n".join([*sections, _outside()])


def _group(group: str, about: str) -> str:
    """Return the tables of a group: its options, and their settings."""
    names = options(group)
    heads = {name: _first_comment(bundled("conf") / group / f"{name}.yaml") for name in names}
    text = f"## {group}\n\n{about[0].upper()}{about[1:]}.\n\n"
    if group == "experiment":
        return text + table(("option", "meaning"), [(code(name), heads[name]) for name in names])
    by_option = {name: _settings_of(group, name) for name in names if name != "none"}
    every = list(dict.fromkeys(setting for own in by_option.values() for setting in own))
    differing = [setting for setting in every if len(_defaults(by_option, setting)) > MANY]
    text += table(
        ("option", "meaning", *map(code, differing)),
        [(code(name), heads[name], *(_default(by_option, name, setting) for setting in differing)) for name in names],
    )
    prefix = PREFIXES.get(group, f"{group}.OPTION" if group in MULTIPLE_CHOICE else group)
    rows = [_row(by_option, setting, f"{prefix}.{setting}", setting in differing) for setting in every]
    return f"{text}\n\n{table(('setting', 'default', 'values', 'meaning', 'only in'), rows)}" if rows else text


def _row(by_option: dict[str, dict[str, Setting]], setting: str, name: str, differs: bool) -> tuple[str, ...]:
    having = {option: own[setting] for option, own in by_option.items() if setting in own}
    values = dict.fromkeys(one.values for one in having.values() if one.values)
    meanings = Counter(one.meaning for one in having.values() if one.meaning) or Counter([""])
    usual, *others = _defaults(by_option, setting).items()
    default = code(usual[0]) if usual[0] else "needed"
    for value, those in others:
        default += f"; {', '.join(those)}: {code(value)}"
    only = f"{len(having)} options" if len(having) > MANY else ", ".join(map(code, having))
    only = "" if len(having) == len(by_option) else only
    longest = max(values, key=len, default="")
    return (
        code(name),
        "by option" if differs else default,
        longest,
        meanings.most_common(1)[0][0],
        only,
    )


def _defaults(by_option: dict[str, dict[str, Setting]], setting: str) -> dict[str, list[str]]:
    """Return the options by the default that they give a setting, the most frequent default first."""
    found: dict[str, list[str]] = {}
    for option, own in by_option.items():
        if setting in own:
            found.setdefault(own[setting].default, []).append(option)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _default(by_option: dict[str, dict[str, Setting]], option: str, setting: str) -> str:
    own = by_option.get(option, {})
    return own[setting].default if setting in own else ""


def _settings_of(group: str, option: str) -> dict[str, Setting]:
    """Return the settings of an option, with those of the options that it extends."""
    path = bundled("conf") / group / f"{option}.yaml"
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    found: dict[str, Setting] = {}
    for base in values.pop("defaults", []):
        if isinstance(base, str) and base in options(group):
            found |= _settings_of(group, base)
        elif isinstance(base, dict):  # `/model@dense: smol` is a setting that takes an option
            nested = [key.partition("@") for key in base if "@" in str(key) and "override" not in str(key)]
            for key, _, name in nested:
                chosen = base[f"{key}@{name}"]
                note = f"an option: `{key.strip('/')}@{group}.{name}=OPTION`"
                found[name] = Setting(chosen, "", note)
    target = values.pop("_target_", None)
    types, meanings = _fields(target)
    comments = _comments(path)
    for name, value in flat_settings(values).items():
        before = found.get(name, Setting("", "", ""))
        meaning = CHOICES.sub("", comments.get(name, "")) or meanings.get(name, "") or before.meaning
        found[name] = Setting(_shown(value), types.get(name, before.values), _sentence(meaning))
    return found


def _outside() -> str:
    """Return the table of the settings at the top of conf/config.yaml."""
    path = bundled("conf") / "config.yaml"
    values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(values, dict)
    rows, about = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        name = line.partition(":")[0]
        if line.startswith("# "):
            about = line.removeprefix("# ")
        elif line[:1].isalpha() and name not in ("defaults", "hydra"):
            value = values[name] if isinstance(values[name], dict) else {"": values[name]}
            target = value.pop("_target_", None)
            types, meanings = _fields(target)
            for key, default in flat_settings(value).items():
                meaning = meanings.get(key, about)
                rows.append((code(f"{name}.{key}".rstrip(".")), code(_shown(default)), types.get(key, ""), meaning))
    return "## Outside the groups\n\n" + table(("setting", "default", "values", "meaning"), rows)


def _shown(value: Any) -> str:
    if value == "???":
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else str(value)


def _sentence(text: str) -> str:
    """Return a text with a capital at its beginning, unless it begins with a value such as `true:`."""
    return text[:1].upper() + text[1:].rstrip(".") if re.match(r"[a-z-]+[ ,]", text) else text.rstrip(".")


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line)


def _comments(path: Path) -> dict[str, str]:
    """Return the comment behind each setting of a file. A nested setting counts by its last name."""
    lines = re.findall(r"^ *([a-z]\w*):[^#\n]*#(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: comment.strip() for name, comment in lines}


def _fields(target: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return the types and the documented meanings of a class's settings, by their names."""
    if target is None:
        return {}, {}
    module, _, name = target.rpartition(".")
    constructor = getattr(importlib.import_module(module), name)
    if not inspect.isclass(constructor):
        return {}, {}
    types = {name: values(kind) for name, kind in get_type_hints(constructor, include_extras=True).items()}
    meanings: dict[str, str] = {}
    for parent in reversed(constructor.__mro__):
        meanings |= _documented(parent)
    return types, meanings


def _documented(kind: type) -> dict[str, str]:
    sections = griffe.Docstring(inspect.getdoc(kind) or "").parse("google", warnings=False)
    return {
        item.name: item.description
        for section in sections
        if section.kind is griffe.DocstringSectionKind.parameters
        for item in section.value
    }


def values(kind: Any, limits: str = "") -> str:
    """Return the values that a type allows, in words.

    Example:
        >>> values(Literal["token", "static"] | None)
        '`token`, `static`, `null`'
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return values(inner[0], _limits(inner[1:]))
    if origin is Literal:
        return ", ".join(code(value) for value in inner)
    if origin in (Union, UnionType):
        return ", ".join(dict.fromkeys(values(one, limits) for one in inner))
    if kind is NoneType:
        return "`null`"
    if origin in (list, tuple):
        return f"list of {values(inner[0])}"
    return f"{WORDS.get(origin or kind, '')} {limits}".strip()


def _limits(metadata: Iterable[Any]) -> str:
    """Return the range of a field, such as `at least 1`."""
    found: dict[str, Any] = {}
    for one in metadata:
        for limit in getattr(one, "metadata", [one]):
            for name in ("ge", "gt", "le", "lt", "multiple_of"):
                if getattr(limit, name, None) is not None:
                    found[name] = getattr(limit, name)
    if "ge" in found and "le" in found:
        return f"from {found['ge']} to {found['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
    return " and ".join(f"{words[name]} {value}" for name, value in found.items())
