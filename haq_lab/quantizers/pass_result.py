"""What one pass through the layers returns, and the state that it carries from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from haq_lab.calibration.channel_ranges import Ranges
from haq_lab.quantizers.apply import LinearReport
from haq_lab.routing.choices import Routing
from haq_lab.utils.timer import Stopwatch

Level = Literal["fp", "smoothed", "quantized"]


@dataclass
class PassResult:
    """Hidden states after the last layer, by dataset and level, what was done to each linear, how the calibration
    tokens were routed (None for a dense model, or one that needed no calibration), and what ranges its inputs had."""

    hidden: dict[str, dict[Level, Tensor]]
    reports: list[LinearReport] = field(default_factory=list)
    routing: Routing | None = None
    ranges: Ranges = field(default_factory=Ranges)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


@dataclass
class PassState:
    """What a pass carries from one layer to the next: hidden states (n, t, d) by name, and the result so far.

    Attributes:
        at: Before which layer those stand that need not keep pace, since stages that are kept can stand in for them.
    """

    hidden: dict[str, Tensor]
    result: PassResult
    at: dict[str, int]


class LayerStore(Protocol):
    """Keeps finished layers and the state between them, so that a killed pass can go on (`haq_lab.checkpoint`)."""

    def restore(self, state: PassState) -> int:
        """Bring a fresh state to where an earlier pass was; returns how many layers are done."""
        ...

    def keep(self, index: int, layer: nn.Module, state: PassState) -> None:
        """A layer in its final form, and the state after it."""
        ...
