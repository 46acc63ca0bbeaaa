"""Record the arguments that a model gives to its decoder layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Recorder(nn.Module):
    """Replaces a decoder layer in a model and records its arguments.

    It returns `replay` if it is set, otherwise the hidden states that it received.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.replay: Tensor | None = None

    def forward(self, hidden: Tensor, *unused: None, **arguments: Any) -> Tensor:
        assert all(argument is None for argument in unused), "a layer receives more than the hidden states"
        self.received, self.arguments = hidden, arguments
        return hidden if self.replay is None else self.replay
