"""The routing trace that offloading is planned from, where calibration has not recorded one."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.models.layered import LayeredModel
from haq_lab.offload.record import record_trace
from haq_lab.offload.trace import Trace
from haq_lab.stages.keys import key_of, model_hash, tokens_hash
from haq_lab.stages.store import Artefact, Store

ARRAYS = ("experts", "weights")


def routing_trace(store: Store, model: LayeredModel, windows: Tensor, text: str) -> Trace:
    """As `record_trace`, of token windows (n, t) whose tokens are all decoded."""
    if store.folder is None or model.quantized:
        return record_trace(model, windows, text)
    depends = {"model": model_hash(model.folder), "tokens": tokens_hash(windows)}
    key = key_of("trace", ("models", "offload/record.py"), **depends)

    def record() -> Artefact:
        trace = record_trace(model, windows, text)
        return Artefact({name: torch.from_numpy(getattr(trace, name)) for name in ARRAYS}, trace.expert_count)

    about = f"{model.folder.name}, {len(windows)} x {windows.shape[1]} tokens"
    found = store.fetch("trace", key, record, about)
    experts, weights = (found.tensors[name].numpy() for name in ARRAYS)
    starts = torch.arange(len(windows)).numpy() * windows.shape[1]
    decode = torch.ones(windows.numel(), dtype=torch.bool).numpy()
    return Trace(experts, weights, decode, starts, found.facts, str(model.folder.name), text)
