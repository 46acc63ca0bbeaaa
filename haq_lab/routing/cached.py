"""Record a routing trace for offloading, or read it from the result cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from haq_lab.models.layerwise import LayeredModel
from haq_lab.result_cache.keys import about, key_of, of_text
from haq_lab.result_cache.store import Artifact, Store
from haq_lab.routing.record import record_trace
from haq_lab.routing.trace import Trace

ARRAYS = ("experts", "weights")


def routing_trace(store: Store, model: LayeredModel, windows: Tensor, text: str) -> Trace:
    """Return the routing trace of a text, all of whose tokens count as decoded.

    Args:
        store: The result cache. It is not used for a quantised model.
        model: The model. It must have experts.
        windows: (n, t) token windows, each a sequence.
        text: Name of the text.
    """
    if store.folder is None or model.quantized:
        return record_trace(model, windows, text)
    key = key_of("trace", (__name__,), **of_text(model, windows))

    def record() -> Artifact:
        trace = record_trace(model, windows, text)
        return Artifact({name: torch.from_numpy(getattr(trace, name)) for name in ARRAYS}, trace.expert_count)

    result = store.fetch("trace", key, record, about(model, windows))
    experts, weights = (result.tensors[name].numpy() for name in ARRAYS)
    starts = np.arange(len(windows), dtype=np.int64) * windows.shape[1]
    decode = np.ones(windows.numel(), bool)
    return Trace(experts, weights, decode, starts, result.facts, model.folder.name, text)
