"""Decode by whole decoder layers: the rate at which their weights stream, over the read bandwidth; JSON as the last line.

    python experiments/benchmarks/cpu_layer.py

SmolLM2-135M's layers, one native call each, one token at a time over a context of `--context` positions; all layers in
turn, as in a model, so that weights come from beyond the second-level cache. The same bytes are then read plainly. Keys,
values and activations are not counted as bytes: they are work beside the weights.
"""

from __future__ import annotations

import argparse
import json
from statistics import median

import torch
from cpu_gemm import machine
from model_speed import clock, model, since, whole

from haq_lab.int8 import native
from haq_lab.int8.decoder import NativeLayer
from haq_lab.int8.key_values import KeyValues
from haq_lab.int8.linear import Int8Linear
from haq_lab.quantizers.rtn import RTN


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = [module for module in whole(model(), RTN()).modules() if isinstance(module, NativeLayer)]
    kept = [KeyValues(layer.kv_heads, layer.head_dim) for layer in layers]
    weights = [[m.packed for m in layer.modules() if isinstance(m, Int8Linear)] for layer in layers]
    size = sum(packed.numel() for packed in weights[0])
    data = native.side_by_side([packed for layer in weights for packed in layer])
    block = torch.as_strided(data[0], (len(layers) * size,), (1,))
    hidden, angles = torch.randn(1, 1, layers[0].heads * layers[0].head_dim), torch.randn(1, 1, layers[0].head_dim)
    layer_seconds, read_seconds = [], []
    for turn in range(arguments.rounds + 1):
        start = clock()
        native.read_bytes(block)
        read = since(start)
        for layer, keys in zip(layers, kept, strict=True):
            keys.reserve(arguments.context + 1)
            keys.length = arguments.context
        start = clock()
        for layer, keys in zip(layers, kept, strict=True):
            layer.step(hidden, angles, angles, keys)
        if turn:  # the first warms up
            layer_seconds.append(since(start))
            read_seconds.append(read)
    shares = [[r[i] / s[i] for s, r in zip(layer_seconds, read_seconds, strict=True)] for i in (0, 1)]
    result = {
        "machine": machine(),
        "isa": native.isa(),
        "threads": arguments.threads,
        "context": arguments.context,
        "bytes_per_layer": size,
        "microseconds_per_layer": round(1e6 * min(cpu for _, cpu in layer_seconds) / len(layers), 1),
        "read_gb_per_s": round(len(layers) * size / min(cpu for _, cpu in read_seconds) / 1e9, 1),
        "share_of_read": {name: round(median(share), 3) for name, share in zip(("wall", "cpu"), shares, strict=True)},
        "best_share_of_read": round(min(cpu for _, cpu in read_seconds) / min(cpu for _, cpu in layer_seconds), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
