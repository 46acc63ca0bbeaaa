"""List the groups, options and settings of the config, and build the text of `--help` from the config files."""

from __future__ import annotations

import re
from pathlib import Path

from haq_lab.utils.paths import bundled

GROUPS = {
    "model": "the model that is quantised or evaluated",
    "quantizer": "the quantization method",
    "data": "evaluation texts. Choose any number: data=[wikitext2,c4]",
    "calibration": "the calibration text",
    "backend": "the kernels that compute the int8 products",
    "offload": "which experts stay in memory, and where the others run",
    "hardware": "the machine on which a run with offloading is simulated. Its costs also guide the offloading",
    "measure": "what is measured. Choose any number: measure=[perplexity,memory,latency]",
    "tracking": "trackers that get a copy of each run. Choose any number: tracking=[offline]",
    "experiment": "predefined experiments: +experiment=NAME",
}

PLAIN = {"checkpoint": ["dir"], "result_cache": ["enabled", "dir", "max_size"]}  # settings outside the groups
HYDRA = {"": ["launcher", "sweeper"], "run": ["dir"], "sweep": ["dir", "subdir"]}  # Hydra's settings for hints
KNOWN = [*GROUPS, *PLAIN, "search_metric", "seeds", "force"]  # all names at the top of a config
MULTIPLE_CHOICE = ("data", "measure", "tracking")  # groups that take any number of options
FOR_ALL = {"tracking": ["private"]}  # settings of such a group that hold for all its options

HEAD = """Quantise a large language model, offload its experts, and measure quality, memory and latency.

  python -m haq_lab [GROUP=OPTION ...] [GROUP.SETTING=VALUE ...]     run one experiment
  python -m haq_lab -m quantizer=rtn,haq ...                         run a sweep over all combinations
  python -m haq_lab.generate DIR ["PROMPT"]                          write text with a checkpoint, or chat with it
  python -m haq_lab.serve DIR                                        serve a checkpoint to OpenAI clients
  python -m haq_lab.results DIR... [--csv FILE]                      print all runs below DIR as a table
  python -m haq_lab.report DIR... -o report.html                     write one page about them, with figures
  python -m haq_lab.models build OPTION                              build a small model and check it
  python -m haq_lab.checkpoint inspect|verify|export DIR             inspect, verify or export a checkpoint
  python -m haq_lab.tracking sync DIR...                             upload the W&B files of offline runs
  python -m haq_lab.result_cache ls|gc                               list or trim the results that runs share
  python -m haq_lab.offload trace|replay|plan|profile ...            record traces, compare policies, plan memory

`haq-lab COMMAND` is short for `python -m haq_lab.COMMAND`.
"""

TAIL = """
checkpoint.dir=DIR   write the quantised model to DIR. A killed run resumes from it. model=quantized loads it.
result_cache.enabled=false           compute everything again
result_cache.dir=DIR                 folder of the result cache
result_cache.max_size=20GB           size of the result cache
-m hydra/launcher=local|slurm|cluster    run the jobs of a sweep in parallel (extras: joblib, submitit, ray)
-m hydra/sweeper=search search_metric=METRIC quantizer.smoothing_strength='interval(0,1)'
                     search for the best settings with optuna. The same command resumes the search.
tracking.private=true    trackers get neither settings, paths, the command line nor the name of this machine
force=true           run again, even if this config has a finished run
hydra.run.dir=DIR    folder of the run
hydra.sweep.dir=DIR  folder of the sweep. Each job has its own folder in it.
--cfg job            print the composed config
"""


def options(group: str) -> list[str]:
    """Return the names of a group's options."""
    return sorted(path.stem for path in (bundled("conf") / group).glob("*.yaml"))


def help_text() -> str:
    """Return the text of `--help`, with a line for each group, option and setting."""
    lines = [HEAD]
    for group, description in GROUPS.items():
        lines.append(f"{group}: {description}")
        for option in options(group):
            lines += _option_lines(bundled("conf") / group / f"{option}.yaml", option)
    return "\n".join([*lines, TAIL])


def _option_lines(path: Path, option: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    lines = [f"  {option:<22}{comments[0] if comments else ''}"]
    if path.parent.name != "experiment":
        settings = [line for line in text.splitlines() if re.match(r"(?!defaults:)[a-z]\w*:", line)]
        lines += [f"      (settings of {base}, except:)" for base in _bases(text) if settings]
        lines += [f"      {line}" for line in settings]
    return lines


def _bases(text: str) -> list[str]:
    """Return the options of the same group that an option's file extends."""
    return re.findall(r"^  - (?!_self_)(\w+)(?: +#.*)?$", text, flags=re.MULTILINE)


def settings_of(group: str, option: str) -> list[str]:
    """Return the names of an option's settings, with those of the options that it extends."""
    text = (bundled("conf") / group / f"{option}.yaml").read_text(encoding="utf-8")
    own = re.findall(r"^(?!defaults:)([a-z]\w*):", text, flags=re.MULTILINE)
    return [*own, *(name for base in _bases(text) for name in settings_of(group, base))]
