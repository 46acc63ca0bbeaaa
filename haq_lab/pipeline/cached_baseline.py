"""The full-precision model's hidden states after its last layer: what every quantised model is held against."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from haq_lab.models.layerwise import LayeredModel
from haq_lab.result_cache.keys import about, key_of, of_text
from haq_lab.result_cache.store import Artifact, Store

STAGE = "baseline"
PIECE = 256 << 20  # bytes of hidden states in one artefact: reading them back must not take the memory of all


def find_baseline(store: Store, model: LayeredModel, windows: Tensor, hidden: Tensor) -> bool:
    """Put them where the embedded windows (n, t) were, `hidden` (n, t, d); False, and no change, where they are not
    all there."""
    if store.folder is None:
        return False
    for key, piece in _pieces(model, windows, hidden):
        if (found := store.get(STAGE, key)) is None:
            model.embed(windows, lambda *shape, dtype: hidden)  # what earlier pieces were written to
            return False
        piece.copy_(found.tensors["hidden"])
    return True


def keep_baseline(store: Store, model: LayeredModel, windows: Tensor, hidden: Tensor) -> None:
    """Keep them."""
    if store.folder is None or not store.has_room(STAGE, hidden.nbytes):
        return
    for key, piece in _pieces(model, windows, hidden):
        store.put(STAGE, key, Artifact({"hidden": piece}), about(model, piece))


def _pieces(model: LayeredModel, windows: Tensor, hidden: Tensor) -> Iterator[tuple[str, Tensor]]:
    depends = of_text(model, windows)
    size = max(1, PIECE // max(hidden[:1].nbytes, 1))
    for number, piece in enumerate(hidden.split(size)):
        yield key_of(STAGE, (__name__,), **depends, piece=number), piece
