"""The result of one pass through the layers, and the state between two layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from haq_lab.calibration.channel_ranges import Ranges
from haq_lab.quantizers.apply import LinearReport
from haq_lab.routing.choices import Routing
from haq_lab.utils.timer import Stopwatch

Level = Literal["fp", "fp_no_prefix", "smoothed", "quantized"]


@dataclass
class PassResult:
    """The result of one pass through all layers.

    Attributes:
        hidden: Hidden states (n, t, d) after the last layer, by dataset and level.
        reports: One row of the per-layer table for each linear.
        routing: Routing of the calibration tokens; None for a dense model or without calibration.
        ranges: Ranges of the inputs before and after smoothing.
        stopwatch: Seconds spent in each stage.
    """

    hidden: dict[str, dict[Level, Tensor]]
    reports: list[LinearReport] = field(default_factory=list)
    routing: Routing | None = None
    ranges: Ranges = field(default_factory=Ranges)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


@dataclass
class PassState:
    """The state of a pass between two layers.

    Attributes:
        hidden: Hidden states (n, t, d) by name.
        result: The result so far.
        at: By name, the index of the next layer for hidden states that may lag behind. They lag while results from the
            result cache make it unnecessary to run them.
    """

    hidden: dict[str, Tensor]
    result: PassResult
    at: dict[str, int]


class LayerStore(Protocol):
    """Stores finished layers, so that an interrupted pass can resume (`haq_lab.checkpoint`)."""

    def restore(self, state: PassState) -> int:
        """Load the state of an earlier pass into `state`, and return the number of finished layers."""
        ...

    def keep(self, index: int, layer: nn.Module, state: PassState) -> None:
        """Store a finished layer and the state after it."""
        ...
