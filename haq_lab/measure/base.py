"""Define what a measurement receives and what it implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from torch import Tensor, nn

from haq_lab.data.windows import Windows
from haq_lab.measure.prompts import PromptTexts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.pass_result import PassResult


@dataclass
class Study:
    """A model after its pass, and everything that a measurement needs.

    Attributes:
        model: The model, which loads layers one by one.
        windows: Evaluation windows (n, t) by dataset.
        passed: Result of the sequential pass.
        whole: The deployed model. It has no layers if no measure `deploys`.
        progress: Shows a line about what is being measured.
        prompts: The prompts of each measure that is a `PromptedMeasure`.
        counting: Context in which the offloading engine counts hits and bytes for the metrics of the run.
        documents: By dataset, the document (n,) of each window, if several windows can come from one document.
        tables: Tables that a measure adds to its metrics. The run folder gets each as `<name>.csv`.
        reference: Loads the model in full precision and without offloading, ready to run. None if the run has none.
        offloaded: Whether experts are offloaded.
        aside: Context in which the offloading engine counts nothing.
    """

    model: LayeredModel
    windows: dict[str, Tensor]
    passed: PassResult
    whole: nn.Module
    progress: Callable[[str], None]
    prompts: Mapping[Any, Windows] = field(default_factory=dict)
    counting: Callable[[], AbstractContextManager[None]] = nullcontext
    documents: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    reference: Callable[[], nn.Module] | None = None
    offloaded: bool = False
    aside: Callable[[], AbstractContextManager[None]] = nullcontext


class Measure(Protocol):
    """One entry of `measure=[...]`.

    Attributes:
        evaluates: Whether it needs the hidden states of the evaluation windows.
        deploys: Whether it needs the whole model in memory.
    """

    evaluates: bool
    deploys: bool

    def __call__(self, study: Study) -> dict[str, float]:
        """Measure a model and return the metrics by their full names."""
        ...


@runtime_checkable
class PromptedMeasure(Measure, Protocol):
    """A measure that runs prompts. The run loads them before the pass, so that mistakes are reported early."""

    def load_prompts(self, model: LayeredModel, texts: PromptTexts) -> Windows:
        """Return the prompts and their stamp, which `results.json` records as `protocol.<measure>`."""
        ...


def needs_reference(measure: object) -> bool:
    """Return whether a measure compares the model with the full-precision model (its setting `against`)."""
    return getattr(measure, "against", None) is not None
