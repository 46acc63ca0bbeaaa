"""Explain a user's mistake in one line, and exit with code 2.

Hydra and OmegaConf often say only that a name does not exist. The messages here also name the nearest valid spelling.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from haq_lab.config.help import FOR_ALL, GROUPS, HYDRA, KNOWN, MULTIPLE_CHOICE, PLAIN, options, settings_of
from haq_lab.config.override_syntax import spelling_of_path
from haq_lab.results.old_names import SETTINGS
from haq_lab.utils.console import errors, say
from haq_lab.utils.errors import UserError, invalid, nearest, renamed
from haq_lab.utils.paths import cache_folder

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, OSError)  # caused by the user or the machine
# Mistakes that Hydra, its plug-ins or Python raise as another type. The message begins or contains the key.
PLAIN_ERRORS = {
    "Config group override must be": "a group cannot be null. Choose one of its options, such as quantizer=none.",
    'Could not detect "srun"': "hydra/launcher=slurm: this machine has no SLURM, because `srun` is not on the PATH. "
    "Choose hydra/launcher=local.",
    "Could not determine home directory": "HOME: the home folder of this user cannot be found. Set HOME, or set "
    "HAQ_LAB_CACHE to a folder that you can write to and write all paths without '~'.",
}
# Names that other tools use for an option.
SYNONYMS = {("backend", "gpu"): "cuda", ("tracking", "wandb"): "offline"}

_EXTRA = re.compile(r"'(?:hydra_plugins\.hydra_|hydra/launcher/|hydra/sweeper/)(joblib|submitit|ray|optuna)[\w./]*'")


@contextmanager
def report_user_errors(program: str) -> Iterator[None]:
    """Print a user's mistake within the block as one message, and exit with code 2.

    Args:
        program: Name before the message, such as `haq_lab.report`.
    """
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        say(f"{program}: {explain(error)}", on=errors)
        sys.exit(2)


def is_user_error(error: BaseException) -> bool:
    """Return whether the user or the machine caused an error. If not, it is a bug."""
    if isinstance(error, USER_ERRORS) or _is_storage_error(error):
        return True
    return any(message in str(error) for message in PLAIN_ERRORS)


def explain(error: BaseException) -> str:
    """Return the message for a user's mistake: what is wrong, which value, and what to do.

    Args:
        error: An error for which `is_user_error` is true.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, HydraException):  # one of Hydra's errors is both
        return _os_error(error)
    if _is_storage_error(error):
        return _storage_error(error)
    links = _chain(error)
    for link in links:
        if isinstance(link, OverrideParseException):
            return _parse_error(link)
    message = "\n".join(dict.fromkeys(str(link).strip() for link in links))
    if ambiguous := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", message):
        name, value = ambiguous.groups()
        return (
            f"{name}: '{value}' is a list of values. Add --multirun to run each of them, write {name}=[{value}] for a "
            f"list, or quote a text: \"{name}='{value}'\"."
        )
    if plugin := _EXTRA.search(message):
        extra = plugin.group(1)
        return f"hydra: {extra} is not installed. Run: pip install 'haq-lab[{extra}]'"
    if missing := re.search(r"Could not (?:find|load) '((?:hydra/)?\w+)/([^']*)'", message):
        return str(unknown_option(*missing.groups()))
    if override := re.search(r"Could not override '([^']+)'", message):
        return _unknown_key(override.group(1))
    if appended := re.search(r"Could not append to config\. An item is already at '([^']+)'", message):
        return f"{appended.group(1)}: the config has this setting already. Write it without '+'."
    if key := re.search(r"[Kk]ey '?([\w.]+)'? (?:is )?not in", message):
        full = re.search(r"full_key: (\S+)", message)
        return _unknown_key((full or key).group(1))
    for part, explanation in PLAIN_ERRORS.items():
        if part in message:
            return explanation
    return _one_line(message) or type(error).__name__


def unknown_option(group: str, option: str) -> UserError:
    """Return the error for an option that a group does not have. It suggests the spelling for a file or a hub name."""
    if spelling := spelling_of_path(group, option):
        words = f"{spelling.option} {spelling.setting}={option}"
        return UserError(f"{group}: '{option}' is not an option of {group}. Write {words}.")
    if group == "quantizer" and "." in option:  # a class of the user's own
        return UserError(f"quantizer: '{option}' is not an option. Write quantizer=rtn quantizer._target_={option}.")
    if synonym := SYNONYMS.get((group, option)):
        return UserError(f"{group}: '{option}' is not one of {', '.join(options(group))} (did you mean '{synonym}'?)")
    return invalid(group, option, options(group))


def unknown_group(name: str) -> UserError:
    """Return the error for a name that a config does not have at its top."""
    hint = nearest(name.partition(".")[0], KNOWN) or ". `python -m haq_lab --help` lists all."
    return UserError(f"{name}: there is no such group or setting{hint}")


def _parse_error(error: OverrideParseException) -> str:
    """Explain an override that Hydra cannot parse, for example because its value contains `=`."""
    name, separator, value = error.override.partition("=")
    if not separator:
        return f"{name}: a value is needed. Write {name}=VALUE."
    reason = _one_line(str(error)).removeprefix(f"{type(error).__name__}: ")
    quoted = value.strip("'\"").replace("'", r"\'")
    return f"{name}: '{value}' cannot be parsed ({reason}). Quote the value: \"{name}='{quoted}'\"."


def _is_storage_error(error: BaseException) -> bool:
    """Return whether optuna could not open the storage of a search (`hydra.sweeper.storage`)."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "optuna.storages" for frame, _ in frames)


def _storage_error(error: BaseException) -> str:
    """Explain why a search cannot use its storage. Without a message of its own, it is the version of SQLAlchemy."""
    reason, remedy = _one_line(str(error)), "Remove it"
    if not reason:
        reason = f"optuna {version('optuna')} does not work with SQLAlchemy {version('SQLAlchemy')}"
        remedy = "Run: pip install 'haq-lab[optuna]', or remove it"
    return (
        f"hydra.sweeper.storage: the search cannot use this storage ({reason}). "
        f"{remedy}: the same command resumes a search without it too."
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and its causes."""
    links = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__
    return links


def _one_line(message: str) -> str:
    """Join the lines of a message, without OmegaConf's internals."""
    lines = [line.strip() for line in message.splitlines()]
    noise = ("full_key", "object_type", "reference_type", "see https://hydra.cc", "set the environment variable", "^")
    return " ".join(line for line in lines if line and not line.lower().startswith(noise))


def _os_error(error: OSError) -> str:
    """Explain an error of the operating system. Name the variable that moves a cache folder if it is at fault."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error) or type(error).__name__
    if not error.filename:
        return reason
    message = f"{error.filename}: {reason}"
    if variable := _variable_of_cache(Path(str(error.filename)).absolute()):
        return f"{message}. Set {variable} to a folder that you can write to."
    return message


def _variable_of_cache(path: Path) -> str | None:
    """Return the environment variable that moves the cache folder in which, or above which, a path lies."""
    from huggingface_hub.constants import HF_HOME

    folders = {"HF_HOME": Path(HF_HOME)}
    with suppress(UserError):
        folders = {"HAQ_LAB_CACHE": cache_folder()} | folders
    for variable, folder in folders.items():
        if path.is_relative_to(folder.absolute()) or folder.absolute().is_relative_to(path):
            return variable
    return None


def _unknown_key(key: str) -> str:
    """Explain a key that the config does not have, with the nearest key that it has."""
    if key in SETTINGS:
        return str(renamed(key, SETTINGS[key]))
    group, _, setting = key.replace("/", ".").partition(".")
    if group in PLAIN:
        known = [f"{group}.{name}" for name in PLAIN[group]]
        choices = ", ".join(known)
        return f"{key}: there is no such setting{nearest(key, known) or f'. Choose one of {choices}.'}"
    if group not in GROUPS and group != "hydra":
        return str(unknown_group(key))
    if not setting:
        return f"{group}: the config has no such group yet. Write +{group}=OPTION (one of {', '.join(options(group))})."
    inner, _, name = setting.rpartition(".")
    if group in MULTIPLE_CHOICE and inner and inner not in options(group):
        return str(invalid(key, inner, options(group)))
    if inner in options(group):  # data.wikitext2.path: perhaps the option is not chosen
        known = settings_of(group, inner)
        if name in known:
            return f"{key}: '{inner}' is not among the options chosen. Add it to {group}=[...]."
    else:
        known = [name for option in options(group) for name in settings_of(group, option)]
        known += [*options(group), *FOR_ALL.get(group, [])] if group in MULTIPLE_CHOICE and not inner else []
        known += HYDRA.get(inner, []) if group == "hydra" else []
    having = [option for option in options(group) if option != "none" and name in settings_of(group, option)]
    if having and not inner:
        if group in MULTIPLE_CHOICE:
            return (
                f"{key}: there is no such setting. Write {group}.OPTION.{name}, where OPTION is one of "
                f"{', '.join(having)}."
            )
        return (
            f"{key}: only {group}={', '.join(having)} has this setting. Choose only from these options, "
            "or remove the setting."
        )
    hint = nearest(name, sorted(set(known))) or ". `python -m haq_lab --help` lists all settings."
    return f"{key}: there is no such setting in the options chosen{hint}"
