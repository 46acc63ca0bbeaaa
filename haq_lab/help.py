"""`--help`, made from the config files themselves, and Hydra's errors in words that name the nearest match."""

from __future__ import annotations

import re
from pathlib import Path

from haq_lab.errors import nearest
from haq_lab.paths import bundled

GROUPS = {
    "model": "what is quantised",
    "quantizer": "how",
    "data": "evaluation texts, any number: data=[wikitext2,c4]",
    "calibration": "calibration text",
    "backend": "what computes the int8 products",
    "measure": "what is measured, any number: measure=[perplexity,memory,latency]",
    "tracking": "Weights & Biases",
    "experiment": "ready-made studies: +experiment=NAME",
}

HEAD = """Squeeze a large language model onto one edge GPU, and measure the price.

  python -m haq_lab [GROUP=OPTION ...] [GROUP.SETTING=VALUE ...]     one run
  python -m haq_lab -m quantizer=rtn,haq ...                         a sweep: every combination
  python -m haq_lab.results DIR... [--csv FILE]                      all runs below DIR as a table
"""

TAIL = """
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
    lines = [f"  {option:<14}{comments[0] if comments else ''}"]
    if path.parent.name != "experiment":
        settings = [line for line in text.splitlines() if re.match(r"[a-z]\w*:", line)]
        lines += [f"      {line}" for line in settings]
    return lines


def explain_hydra(error: Exception) -> str:
    """One message for an error of Hydra, OmegaConf or ours; with the nearest valid name where one is missed."""
    message = str(error).strip()
    if missing := re.search(r"Could not find '([\w/]+)/(\w*)'", message):
        group, option = missing.groups()
        known = options(group)
        return f"{group}: '{option}' is not one of {', '.join(known)}{nearest(option, known)}"
    if override := re.search(r"Could not override '([\w.]+)'", message):
        return _unknown_key(override.group(1))
    if appended := re.search(r"Could not append to config\. An item is already at '([\w.]+)'", message):
        return f"{appended.group(1)}: it is there already; write it without the '+'"
    if "Key '" in message and "not in" in message and "full_key: " in message:
        return _unknown_key(message.split("full_key: ")[1].split()[0])
    first = message.splitlines()[0] if message else type(error).__name__
    return message if "\n" not in message or not first else _without_noise(message)


def _unknown_key(key: str) -> str:
    """A key that no config has, and the nearest that one does."""
    group, _, setting = key.partition(".")
    if not setting:
        return f"there is no group or setting '{key}'{nearest(key, [*GROUPS, 'force'])}"
    name = setting.rpartition(".")[2]
    known: list[str] = []
    for path in (bundled("conf") / group).glob("*.yaml"):
        known += re.findall(r"^([a-z]\w*):", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    known += options(group) if group in ("data", "measure") else []
    return (
        f"{key}: there is no such setting in the options chosen{nearest(name, set(known))}; "
        "`python -m haq_lab --help` lists all"
    )


def _without_noise(message: str) -> str:
    return " ".join(line.strip() for line in message.splitlines() if not line.lstrip().startswith("full_key"))
