"""List the groups, options and settings of the config, and build the text of `--help` from the config files."""

from __future__ import annotations

import re
from pathlib import Path

from haq_lab.utils.paths import bundled

GROUPS = {
    "model": "what is quantised",
    "quantizer": "how",
    "data": "evaluation texts, any number: data=[wikitext2,c4]",
    "calibration": "calibration text",
    "backend": "what computes the int8 products",
    "offload": "which experts stay in memory, and where the others run",
    "hardware": "what the predictor decides for, and a run with offloading is simulated on",
    "measure": "what is measured, any number: measure=[perplexity,memory,latency]",
    "tracking": "trackers that receive a copy of the run, any number: tracking=[offline]",
    "experiment": "ready-made studies: +experiment=NAME",
}

PLAIN = {"checkpoint": ["dir"], "result_cache": ["enabled", "dir", "max_size"]}  # settings that are no group's
HYDRA = {"": ["launcher", "sweeper"], "run": ["dir"], "sweep": ["dir"]}  # its settings for every day, of many
KNOWN = [*GROUPS, *PLAIN, "search_metric", "force"]  # all that a config holds
MULTIPLE_CHOICE = ("data", "measure", "tracking")  # groups of which any number of options can be chosen

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


def settings_of(group: str, option: str) -> list[str]:
    """The settings of a group's option, by its file and those that it begins with."""
    text = (bundled("conf") / group / f"{option}.yaml").read_text(encoding="utf-8")
    own = re.findall(r"^(?!defaults:)([a-z]\w*):", text, flags=re.MULTILINE)
    return [*own, *(name for base in _bases(text) for name in settings_of(group, base))]
