"""`--help`, made from the config files themselves, and Hydra's errors in words that name the nearest match."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from haq_lab.results.old_names import SETTINGS
from haq_lab.utils.console import errors, say
from haq_lab.utils.errors import UserError, nearest
from haq_lab.utils.paths import bundled

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, OSError)  # the user's or the machine's, not bugs
PLAIN_ERRORS = {  # mistakes too, which Hydra and its plug-ins raise as plain ValueError or RuntimeError
    "Config group override must be": "a group needs the name of one of its options (none, where it has that), not null",
    'Could not detect "srun"': "hydra/launcher=slurm: there is no SLURM here (no srun on the path)",
}

GROUPS = {
    "model": "what is quantised",
    "quantizer": "how",
    "data": "evaluation texts, any number: data=[wikitext2,c4]",
    "calibration": "calibration text",
    "backend": "what computes the int8 products",
    "offload": "which experts stay in memory, and where the others run",
    "hardware": "what the predictor decides for, and a run with offloading is simulated on",
    "measure": "what is measured, any number: measure=[perplexity,memory,latency]",
    "tracking": "Weights & Biases",
    "experiment": "ready-made studies: +experiment=NAME",
}

MISSING = re.compile(r"'(?:hydra_plugins\.hydra_|hydra/launcher/|hydra/sweeper/)(joblib|submitit|ray|optuna)[\w./]*'")
PLAIN = {"checkpoint": ["dir"], "result_cache": ["enabled", "dir", "max_size"]}  # settings that are no group's
HYDRA = {"": ["launcher", "sweeper"], "run": ["dir"], "sweep": ["dir"]}  # its settings for every day, of many
KNOWN = [*GROUPS, *PLAIN, "search_metric", "force"]  # all that a config holds
MULTIPLE_CHOICE = ("data", "measure")  # groups of which any number of options can be chosen

HEAD = """Squeeze a large language model onto one edge GPU, and measure the price.

  python -m haq_lab [GROUP=OPTION ...] [GROUP.SETTING=VALUE ...]     one run
  python -m haq_lab -m quantizer=rtn,haq ...                         a sweep: every combination
  python -m haq_lab.results DIR... [--csv FILE]                      all runs below DIR as a table
  python -m haq_lab.report DIR... -o report.html                     the same as one page with figures
  python -m haq_lab.models build OPTION                              make a model that is made here, and check it
  python -m haq_lab.checkpoint inspect|verify|export DIR             a quantised checkpoint
  python -m haq_lab.tracking sync DIR...                             upload what W&B has kept offline
  python -m haq_lab.result_cache ls|gc                                     what runs have left for one another
  python -m haq_lab.offload trace|replay|plan|profile ...            routing traces, policies, what a GPU would do
"""

TAIL = """
checkpoint.dir=DIR   write the quantised model there, and go on with it after a kill; model=quantized runs it
result_cache.enabled=false   compute all anew; result_cache.dir=DIR and result_cache.max_size=20GB place and bound it
-m hydra/launcher=local|slurm|cluster    a sweep's jobs at once: joblib, submitit, ray, each an extra to install
-m hydra/sweeper=search search_metric=METRIC quantizer.smoothing_strength='interval(0,1)'
                     search with optuna instead of trying all values
force=true           run even where a finished run of this config is there
hydra.run.dir=DIR    the run folder (hydra.sweep.dir=DIR for a sweep)
--cfg job            show the composed config
"""


def options(group: str) -> list[str]:
    """The options of a group, by their files."""
    return sorted(path.stem for path in (bundled("conf") / group).glob("*.yaml"))


def help_text() -> str:
    """All groups, options and settings, a line each."""
    lines = [HEAD]
    for group, what in GROUPS.items():
        lines.append(f"{group}: {what}")
        for option in options(group):
            lines += _option_lines(bundled("conf") / group / f"{option}.yaml", option)
    return "\n".join([*lines, TAIL])


def _option_lines(path: Path, option: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    lines = [f"  {option:<22}{comments[0] if comments else ''}"]
    if path.parent.name != "experiment":
        settings = [line for line in text.splitlines() if re.match(r"(?!defaults:)[a-z]\w*:", line)]
        lines += [f"      (as {base}, but)" for base in _bases(text) if settings]
        lines += [f"      {line}" for line in settings]
    return lines


def _bases(text: str) -> list[str]:
    """The options of the same group that an option's file begins with; overrides of other groups are none."""
    return re.findall(r"^  - (?!_self_)(\w+)(?: +#.*)?$", text, flags=re.MULTILINE)


@contextmanager
def report_user_errors(program: str) -> Iterator[None]:
    """Tell a mistake within the block in one message, as `program`, and exit with code 2."""
    try:
        yield
    except USER_ERRORS as error:
        say(f"{program}: {explain(error)}", on=errors)
        sys.exit(2)


def is_user_error(error: BaseException) -> bool:
    """Whether it is the user's or the machine's, and no bug."""
    return isinstance(error, USER_ERRORS) or any(raised in str(error) for raised in PLAIN_ERRORS)


def explain(error: Exception) -> str:
    """One message for a mistake; with the nearest valid name where Hydra or OmegaConf only say that one is missed."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, HydraException):  # one of Hydra's is both
        return _disk(error)
    message = "\n".join(dict.fromkeys(str(link).strip() for link in _chain(error)))
    if bare := re.search(r"Error parsing override '([\w./+~]+)'\s*missing EQUAL", message):
        return f"{bare.group(1)}: a value is needed, as {bare.group(1)}=VALUE"
    if plugin := MISSING.search(message):
        extra = plugin.group(1)
        return f"hydra: {extra} is not installed; run: pip install 'haq-lab[{extra}]'"
    if missing := re.search(r"Could not (?:find|load) '((?:hydra/)?\w+)/([^']*)'", message):
        group, option = missing.groups()
        known = options(group)
        return f"{group}: '{option}' is not one of {', '.join(known)}{nearest(option, known)}"
    if override := re.search(r"Could not override '([^']+)'", message):
        return _unknown_key(override.group(1))
    if appended := re.search(r"Could not append to config\. An item is already at '([^']+)'", message):
        return f"{appended.group(1)}: it is there already; write it without the '+'"
    if key := re.search(r"[Kk]ey '?([\w.]+)'? (?:is )?not in", message):
        full = re.search(r"full_key: (\S+)", message)
        return _unknown_key((full or key).group(1))
    for raised, told in PLAIN_ERRORS.items():
        if raised in message:
            return told
    return _first(message) or type(error).__name__


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and what it came from."""
    links = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__
    return links


def _first(message: str) -> str:
    """A message's lines as one, without the internals that OmegaConf adds."""
    lines = [line.strip() for line in message.splitlines()]
    noise = ("full_key", "object_type", "reference_type", "See https://hydra.cc", "set the environment variable")
    return " ".join(line for line in lines if line and not line.lower().startswith(tuple(map(str.lower, noise))))


def _disk(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOSPC:
        reason = "the disk is full"
    return f"{error.filename}: {reason}" if error.filename else reason


def _unknown_key(key: str) -> str:
    """A key that no config has, and the nearest that one does."""
    if key in SETTINGS:
        return f"{key}: there is no such setting any more. Use {SETTINGS[key]}."
    group, _, setting = key.replace("/", ".").partition(".")
    if group in PLAIN:
        known = [f"{group}.{name}" for name in PLAIN[group]]
        there = f" (there is {', '.join(known)})"
        return f"there is no setting '{key}'{nearest(key, known) or there}"
    if group not in GROUPS and group != "hydra":
        return f"there is no group or setting '{key}'{nearest(group, KNOWN)}"
    if not setting:
        return f"{group}: the config has none; write +{group}=OPTION (one of {', '.join(options(group))})"
    inner, _, name = setting.rpartition(".")
    if group in MULTIPLE_CHOICE and inner and inner not in options(group):
        known = options(group)
        return f"{key}: '{inner}' is not one of {', '.join(known)}{nearest(inner, known)}"
    if inner in options(group):  # data.wikitext2.path: the option may just not be chosen
        known = settings_of(group, inner)
        if name in known:
            return f"{key}: '{inner}' is not among the options chosen; add it to {group}=[...]"
    else:
        known = [name for option in options(group) for name in settings_of(group, option)]
        known += options(group) if group in MULTIPLE_CHOICE and not inner else []
        known += HYDRA.get(inner, []) if group == "hydra" else []
    hint = nearest(name, sorted(set(known)))
    where = [option for option in options(group) if option != "none" and name in settings_of(group, option)]
    if where and not inner:
        if group in MULTIPLE_CHOICE:
            return f"{key}: write {group}.OPTION.{name}, where OPTION is one of {', '.join(where)}"
        return f"{key}: it belongs to {group}={', '.join(where)}; each option chosen must be one of these"
    return f"{key}: there is no such setting in the options chosen{hint}; `python -m haq_lab --help` lists all"


def settings_of(group: str, option: str) -> list[str]:
    """The settings of a group's option, by its file and those that it begins with."""
    text = (bundled("conf") / group / f"{option}.yaml").read_text(encoding="utf-8")
    own = re.findall(r"^(?!defaults:)([a-z]\w*):", text, flags=re.MULTILINE)
    return [*own, *(name for base in _bases(text) for name in settings_of(group, base))]
