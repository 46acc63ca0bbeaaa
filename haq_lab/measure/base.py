"""What a measurement gets to see, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import pandas as pd
from torch import Tensor, nn

from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.pass_result import PassResult


@dataclass
class Study:
    """A model after its pass.

    Attributes:
        windows: Evaluation windows (n, t) by dataset.
        whole: The model as deployed, all layers in place where a measure `deploys`.
        progress: Called with a line on what is being measured.
        tables: What a measure leaves beside its metrics: a table by name, which the run folder gets as `<name>.csv`.
    """

    model: LayeredModel
    windows: dict[str, Tensor]
    passed: PassResult
    whole: nn.Module
    progress: Callable[[str], None]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


class Measure(Protocol):
    """One entry of `measure=[...]`; `evaluates` says whether it needs the evaluation windows in the pass,
    `deploys` whether it needs the whole model in memory."""

    evaluates: bool
    deploys: bool

    def __call__(self, study: Study) -> dict[str, float]:
        """Metrics by their full names."""
        ...
