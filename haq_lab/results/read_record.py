"""Read and validate the `results.json` or `error.json` of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from haq_lab.measure.metrics import Metric
from haq_lab.utils.console import errors, say


class _Run(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str | None = None
    quantizer: str | None = None
    overrides: list[str] = []
    own_metrics: dict[str, Metric] = {}


class _Stamp(BaseModel):
    model_config = ConfigDict(extra="allow")
    comparable_with: list[str] = []


class _Failure(BaseModel):
    message: str = ""


class _Record(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    version: Literal[1] = Field(alias="schema")
    run: _Run = _Run()
    config: dict[str, Any] = {}
    protocol: dict[str, _Stamp] = {}
    metrics: dict[str, float | None] = {}
    not_finite: dict[str, str] = {}
    error: _Failure = _Failure()


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the content of a file, or None if it does not exist. Print one warning line if it is damaged.

    Args:
        path: A `results.json` or `error.json`.
    """
    try:
        record = _Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        say(f"{path} is ignored because it is damaged: {reason}. Run the experiment again.", on=errors)
        return None
    content = record.model_dump(exclude_unset=True)
    own = record.run.own_metrics
    return content | {"run": content.get("run", {}) | ({"own_metrics": own} if own else {})}
