"""Share the full-precision model's last hidden states between runs through the result cache.

Every quantised model is compared with these hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from haq_lab.models.layerwise import LayeredModel
from haq_lab.result_cache.keys import about, key_of, of_text
from haq_lab.result_cache.store import Artifact, Store

STAGE = "baseline"
PIECE = 256 << 20  # bytes of hidden states in one artefact, so that reading does not need memory for all of them


def find_baseline(store: Store, model: LayeredModel, windows: Tensor, hidden: Tensor) -> bool:
    """Replace embedded windows by the stored hidden states after the last layer.

    Args:
        windows: Token windows (n, t).
        hidden: The embedded windows (n, t, d), replaced in place.

    Returns:
        Whether all hidden states were stored. If not, `hidden` is unchanged.
    """
    if store.folder is None:
        return False
    for key, piece in _pieces(model, windows, hidden):
        if (artifact := store.get(STAGE, key)) is None:
            model.embed(windows, lambda *shape, dtype: hidden)  # restores what earlier pieces overwrote
            return False
        piece.copy_(artifact.tensors["hidden"])
    return True


def store_baseline(store: Store, model: LayeredModel, windows: Tensor, hidden: Tensor) -> None:
    """Store the hidden states (n, t, d) of token windows (n, t) after the last layer, if the cache has space."""
    if store.folder is None or not store.has_room(STAGE, hidden.nbytes):
        return
    for key, piece in _pieces(model, windows, hidden):
        store.put(STAGE, key, Artifact({"hidden": piece}), about(model, piece))


def _pieces(model: LayeredModel, windows: Tensor, hidden: Tensor) -> Iterator[tuple[str, Tensor]]:
    depends = of_text(model, windows)
    size = max(1, PIECE // max(hidden[:1].nbytes, 1))
    for number, piece in enumerate(hidden.split(size)):
        yield key_of(STAGE, (__name__,), **depends, piece=number), piece
