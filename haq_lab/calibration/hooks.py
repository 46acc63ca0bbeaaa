"""Run a decoder layer over hidden states and pass the inputs of its linears to observers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from haq_lab.int8.sequences import batch_of
from haq_lab.models.layerwise import LayeredModel
from haq_lab.utils.timer import Stopwatch

Inputs = dict[str, tuple[Tensor, ...]]  # by site: its arguments; a linear has one, (..., k)


class Observer(Protocol):
    """Gathers the inputs of some modules of a layer.

    Attributes:
        sites: Names of the modules.
    """

    sites: tuple[str, ...]

    def add(self, inputs: Inputs, rows: slice) -> None:
        """Add one batch.

        Args:
            inputs: The inputs of each site. A site that no token reached is missing.
            rows: Position of the batch's tokens among all tokens.
        """
        ...


class _AllCaptured(Exception):
    """Raised to end a forward early, once all wanted inputs are captured."""


@contextmanager
def captured_inputs(layer: nn.Module, sites: list[str], stop: bool = False) -> Iterator[Inputs]:
    """Capture the inputs of some modules during a forward of `layer` within the block.

    Args:
        layer: A decoder layer.
        sites: Names of the modules.
        stop: Whether to end the forward, and leave the block, once all inputs are captured.

    Yields:
        The inputs by site, filled during the forward.

    Example:
        >>> with captured_inputs(layer, ["self_attn.o_proj"]) as inputs:  # doctest: +SKIP
        ...     model.forward(layer, index, hidden)
        >>> inputs["self_attn.o_proj"][0].shape
    """
    inputs: Inputs = {}

    def capture(site: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[site] = arguments
            if stop and len(inputs) == len(sites):
                raise _AllCaptured

        return hook

    handles = [layer.get_submodule(site).register_forward_pre_hook(capture(site)) for site in sites]
    try:
        yield inputs
    except _AllCaptured:
        pass
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: LayeredModel,
    layer: nn.Module,
    index: int,
    hidden: Tensor,
    observers: Sequence[Observer],
    clock: Stopwatch,
) -> None:
    """Run a layer over hidden states and pass the inputs of its modules to observers.

    Args:
        model: The model of the layer.
        layer: Decoder layer `index`, in any state. Each forward ends once all inputs are captured.
        index: Its index.
        hidden: (n, t, d) inputs of the layer.
        observers: They receive the inputs.
        clock: Records the stages `forward` (tokens through the layer) and `calibrate` (the statistics).
    """
    sites = list(dict.fromkeys(site for observer in observers for site in observer.sites))
    first = 0
    for batch in hidden.split(model.batch_size(hidden)):
        with clock.stage("forward"), captured_inputs(layer, sites, stop=True) as inputs:
            model.forward(layer, index, batch)
        rows = slice(first, first := first + batch.shape[0] * batch.shape[1])
        with clock.stage("calibrate"), batch_of(*batch.shape[:2]):
            for observer in observers:
                observer.add(inputs, rows)


def record_inputs(
    model: LayeredModel, layer: nn.Module, index: int, hidden: Tensor, sites: list[str]
) -> dict[str, Tensor]:
    """Run a layer over hidden states and return the inputs of some linears.

    Args:
        hidden: (n, t, d) inputs of the layer. They are overwritten by its outputs.
        sites: Names of the linears.

    Returns:
        The inputs (n * t, k) by site.
    """
    recorded: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in hidden.split(model.batch_size(hidden)):
        with captured_inputs(layer, sites) as inputs:
            output = model.forward(layer, index, batch)
        for site in sites:
            x = inputs[site][0].reshape(-1, inputs[site][0].shape[-1])
            # With post-norm (OPT-350M), q, k and v read `batch` itself, which is overwritten below.
            recorded[site].append(x.clone() if x.data_ptr() == batch.data_ptr() else x)
        batch.copy_(output)
    return {site: torch.cat(parts) for site, parts in recorded.items()}
