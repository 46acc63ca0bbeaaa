"""Test experts in different formats on the two tiers: the output is the same for any budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from two_tiers import WINDOWS, decoded, finished

from haq_lab.int8.linear import to_float
from haq_lab.models.experts import Experts
from haq_lab.models.families.family import PROJECTIONS
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.offload.session import OffloadSession
from haq_lab.offload.settings import Offload
from haq_lab.offload.tiers.formats import Formats
from haq_lab.quantizers.rtn import RTN
from haq_lab.result_cache.store import Store
from haq_lab.utils.errors import UserError

PAIRS = [
    (RTN(), "int8", "fp16"),
    (RTN(weight_bits=4, group=32), "int8", "fp16"),
    (None, "int8", "fp16"),
    (None, "bf16", "int8"),
    (None, "bf16", "fp16"),
]


def rounded(layer: Any, host: str, device: str) -> None:
    """The layer's experts as plain float32 linears whose weights have been what the tiers hold."""
    experts = layer.mlp.experts
    for expert in experts:
        for name in PROJECTIONS:
            linear = expert.get_submodule(name)
            weight = to_float(linear) if isinstance(experts, Int8Experts) else linear.weight.detach()
            weight = weight.bfloat16() if host == "bf16" else weight
            weight = weight.half() if device == "fp16" else weight
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            expert.set_submodule(name, plain)
    layer.mlp.experts = Experts(experts)


@torch.no_grad()
@pytest.mark.parametrize(("quantizer", "host", "device"), PAIRS)
def test_the_output_is_that_of_the_formats_weights_whatever_the_budget(model, tmp_path, quantizer, host, device):
    final = finished(model, lambda layer: rounded(layer, host, device), quantizer)
    wanted = decoded(model.assemble(final), steps=5)
    outputs, stats = [], []
    for number, settings in enumerate(
        [{"budget": "100%"}, {"budget": 3, "eviction": "lru"}, {"budget": "50%", "prefetch": "path", "spare": 3}]
    ):
        offload = Offload(**{"spare": 2, **settings}, host_format=host, device_format=device)
        session = OffloadSession(offload, None, model, tmp_path / str(number), Store())
        layers = finished(model, session.add, quantizer)
        session.find_profile(None, WINDOWS, "random")
        session.engage(layers)
        outputs.append(decoded(model.assemble(layers), steps=5))
        stats.append(session.metrics() | {"slot_bytes": session.engine.slow_tier.layouts.largest})
        fetched = session.engine.counters.read.sum()
        session.engine.check()
        session.close()
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])
    torch.testing.assert_close(outputs[0], wanted, rtol=1e-4, atol=1e-4)
    numbers = sum(weight.numel() for weight in model.new_layer(0).mlp.experts[0].parameters())
    moved = {"int8": 4 if quantizer is None else quantizer.bytes_per_weight, "bf16": 2}[host]
    assert stats[0]["slot_bytes"] == pytest.approx(2 * numbers, abs=4096)
    assert stats[0]["offload.bytes_moved"] == 0, "all experts are resident from the start"
    assert stats[-1]["offload.bytes_moved"] / fetched == pytest.approx(moved * numbers, rel=0.2)


@pytest.mark.parametrize(
    ("formats", "quantized", "miss", "message"),
    [
        (Formats("bf16", "int8"), True, "fetch", r"offload\.host_format: 'bf16' does not work with quantised experts"),
        (
            Formats("int8", "fp16"),
            True,
            "predict",
            r"offload\.on_miss: 'predict' does not work with offload\.device_format=fp16",
        ),
        (
            Formats("int8", "fp16"),
            False,
            "cpu",
            r"offload\.on_miss: 'cpu' does not work with offload\.device_format=fp16",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(formats, quantized, miss, message):
    with pytest.raises(UserError, match=message):
        formats.must_suit(quantized, miss)
