"""Name runs in words: the method, the scheme of the activations, and what else tells the runs of a model apart.

Methods have the order of the paper: round to nearest first, HAQ last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

Row = Mapping[Any, Any]  # a run by the names of the table's columns

METHODS = {
    "none": "full precision",
    "rtn": "RTN",
    "smoothquant": "SmoothQuant",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "quarot": "QuaRot",
    "haq": "HAQ",
}
FULL_PRECISION = METHODS["none"]
CHECKPOINT = "checkpoint"  # a model that was quantised before the run
SCHEMES = {"token": "per token", "tensor": "per tensor", "auto": "auto", "static": "static"}
IN_COLUMNS = (
    "model",
    "quantizer",
    "quantizer._target_",
    "quantizer.activations",
    "experiment",
    "measure",
)  # settings that need no words
NOT_NAMED = re.compile(
    r"hydra\.|tracking|result_cache\.|checkpoint\.|force|seeds$|search_metric"
)  # no effect on results
OF_QUANTISED = re.compile(r"quantizer\.|calibration")  # settings without an effect on full precision
LONGEST = 60  # characters of a label


def with_labels(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs in the order of the paper, with their names in words.

    Args:
        runs: Table of runs from `haq_lab.results.load`.

    Returns:
        The runs by model, full precision first, then by scheme and method. New columns:

        - `of`: the model. If a run ended before it was known: that of the runs with the same option `model=NAME`.
        - `method`: such as `SmoothQuant`
        - `scheme`: such as `per token`; empty for full precision
        - `variant`: other overrides in which the model's runs differ, such as `seed 0`
        - `label`: all three, such as `HAQ, static, seed 0`. The scheme is left out if all runs are per token.

    Example:
        >>> with_labels(load("runs/sweep"))["label"].tolist()
        ['full precision', 'RTN', 'HAQ']
    """
    if runs.empty:
        return runs.assign(of="", method="", scheme="", variant="", label="")
    rows: Sequence[Row] = runs.to_dict("records")
    overrides = [_overrides(row) for row in rows]
    both = list(zip(rows, overrides, strict=True))
    runs = runs.assign(
        of=_models(rows, overrides),
        method=[_method(row, own) for row, own in both],
        scheme=[_scheme(row, own) for row, own in both],
        variant="",
        label="",
    )
    given = pd.Series(overrides, index=runs.index, dtype=object)
    for _, own in runs.groupby("of", sort=False):
        finished = (own["status"] == "finished") if "status" in own else pd.Series(True, own.index)
        variants = _variants(list(given[own.index]), list(own["method"]), list(finished))
        all_per_token = set(own["scheme"]) <= {"", SCHEMES["token"]}
        parts = zip(own["method"], [""] * len(own) if all_per_token else own["scheme"], variants, strict=True)
        runs.loc[own.index, "variant"] = variants
        runs.loc[own.index, "label"] = [_cut(", ".join(filter(None, part))) for part in parts]
    place = runs[["method", "scheme"]].apply(lambda run: _place(*run), axis=1)
    return runs.assign(place=place).sort_values(["of", "place"], kind="stable").drop(columns="place")


def _overrides(row: Row) -> dict[str, str]:
    """Return the overrides of a run by their settings. A run without a record has them in its folder's name."""
    given = str(row.get("overrides") or "").split() or re.split(
        r",(?=\+?[\w./]+=)", str(row["folder"]).rpartition("/")[2]
    )
    pairs = (override.lstrip("+~").partition("=") for override in given if "=" in override)
    return {setting: value for setting, _, value in pairs}


def _models(rows: Sequence[Row], overrides: list[dict[str, str]]) -> list[str]:
    models = ["" if pd.isna(row.get("model")) else str(row["model"]) for row in rows]
    options = [own.get("model", "") for own in overrides]
    known = {option: model for option, model in zip(options, models, strict=True) if model}
    return [model or known.get(option, option) for model, option in zip(models, options, strict=True)]


def _method(row: Row, overrides: dict[str, str]) -> str:
    chosen = row.get("quantizer")
    if chosen is None or pd.isna(chosen):
        chosen = overrides.get("quantizer") or str(row["folder"]).rpartition("/")[2]
    if chosen == "none" and row.get("quantized"):
        return CHECKPOINT
    return METHODS.get(str(chosen), str(chosen))


def _scheme(row: Row, overrides: dict[str, str]) -> str:
    chosen = row.get("config.quantizer.activations")
    if chosen is None or pd.isna(chosen):
        chosen = overrides.get("quantizer.activations", "")
    return "" if _method(row, overrides) in (FULL_PRECISION, CHECKPOINT) else SCHEMES.get(str(chosen), str(chosen))


def _variants(overrides: list[dict[str, str]], methods: list[str], finished: list[bool]) -> list[str]:
    """Return the words of the overrides that the runs of a model do not share, for each run.

    A finished run is compared with finished runs only, so that a failed attempt does not make all names longer.
    """
    runs = list(zip(overrides, methods, finished, strict=True))
    settings = dict.fromkeys(setting for own in overrides for setting in own if not NOT_NAMED.match(setting))
    differing: dict[bool, list[str]] = {}
    for done in {*finished}:
        compared = [(own, method) for own, method, other in runs if other or not done]
        differing[done] = [
            setting
            for setting in settings
            if setting not in IN_COLUMNS
            and len({own.get(setting) for own, method in compared if _matters(setting, method)}) > 1
        ]
    return [
        ", ".join(_words(name, own[name]) for name in differing[done] if name in own and _matters(name, method))
        for own, method, done in runs
    ]


def _matters(setting: str, method: str) -> bool:
    """Return whether a setting has an effect on a method."""
    return method != FULL_PRECISION or not OF_QUANTISED.match(setting)


def _words(setting: str, value: str) -> str:
    """Return an override in words, such as `seed 0`, `no act order` or `4-bit weights`."""
    name = setting.rpartition(".")[2].replace("_", " ").strip()
    value = value.strip("[]'\"").replace(",", "/")
    if name == "weight bits":
        return f"{value}-bit weights"
    if value.lower() == "true":
        return name
    return f"no {name}" if value.lower() in ("false", "none", "null") else f"{name} {value}"


def _cut(label: str) -> str:
    return label if len(label) <= LONGEST else f"{label[:LONGEST].rstrip(', ')}..."


def _place(method: str, scheme: str) -> tuple[int, float]:
    """Return a key that sorts runs: full precision, then by scheme and method. HAQ is the last method."""
    methods, schemes = list(METHODS.values()), list(SCHEMES.values())
    if method == FULL_PRECISION:
        return (-1, 0)
    own = len(methods) - 1.5  # a method of the user's own comes before HAQ
    return (
        schemes.index(scheme) if scheme in schemes else len(schemes),
        methods.index(method) if method in methods else own,
    )
