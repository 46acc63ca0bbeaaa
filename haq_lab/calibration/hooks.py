"""Run a decoder layer over the calibration tokens and watch what its linears receive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from haq_lab.models.layerwise import LayeredModel
from haq_lab.utils.timer import Stopwatch


class Watcher(Protocol):
    """Something that gathers what modules of a layer receive; `sites` names the modules."""

    sites: tuple[str, ...]

    def add(self, inputs: dict[str, Tensor], rows: slice) -> None:
        """One batch: the inputs by site, absent where no token reached it; `rows` are the tokens in the batch."""
        ...


class _Reached(Exception):
    """Ends a forward early: the last input of interest has been seen."""


@contextmanager
def captured_inputs(layer: nn.Module, sites: list[str], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within the block, a forward of `layer` leaves the input of each named linear in the yielded dict.

    With `stop`, the forward is abandoned, and the block left, once all of them have been seen.
    """
    inputs: dict[str, Tensor] = {}

    def keep(site: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[site] = arguments[0]
            if stop and len(inputs) == len(sites):
                raise _Reached

        return hook

    handles = [layer.get_submodule(site).register_forward_pre_hook(keep(site)) for site in sites]
    try:
        yield inputs
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: LayeredModel,
    layer: nn.Module,
    index: int,
    hidden: Tensor,
    watchers: Sequence[Watcher],
    clock: Stopwatch,
) -> None:
    """Run a layer over hidden states and show every watcher what it waits for.

    Args:
        layer: Decoder layer `index` of `model`, in whatever state it is; it runs no further than needed.
        hidden: (n, t, d) what the layer receives.
        clock: Gets the stages `forward` (tokens through the layer) and `calibrate` (the statistics).
    """
    sites = list(dict.fromkeys(site for watcher in watchers for site in watcher.sites))
    done = 0
    for batch in hidden.split(model.batch_size(hidden)):
        with clock.stage("forward"), captured_inputs(layer, sites, stop=True) as inputs:
            model.forward(layer, index, batch)
        rows = slice(done, done := done + batch.shape[0] * batch.shape[1])
        with clock.stage("calibrate"):
            for watcher in watchers:
                watcher.add(inputs, rows)


def record_inputs(
    model: LayeredModel, layer: nn.Module, index: int, hidden: Tensor, sites: list[str]
) -> dict[str, Tensor]:
    """The inputs themselves, (n * t, k) by site; advances `hidden` (n, t, d) to the layer's output."""
    recorded: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in hidden.split(model.batch_size(hidden)):
        with captured_inputs(layer, sites) as inputs:
            output = model.forward(layer, index, batch)
        for site in sites:
            x = inputs[site].reshape(-1, inputs[site].shape[-1])
            # Where the norm comes after (OPT-350M), q, k and v read `batch` itself, which is overwritten below.
            recorded[site].append(x.clone() if x.data_ptr() == batch.data_ptr() else x)
        batch.copy_(output)
    return {site: torch.cat(parts) for site, parts in recorded.items()}
