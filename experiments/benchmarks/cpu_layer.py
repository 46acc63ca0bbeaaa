"""Measure how fast whole decoder layers stream their weights, relative to the read bandwidth. The last line is JSON.

    python experiments/benchmarks/cpu_layer.py

All layers of SmolLM2-135M run in one native call, one token at a time, over a context of `--context` positions. So
the weights come from beyond the caches. In turn with this, as many other bytes are read by each instruction set (one
per round, because bytes that are read twice might be cached). The fastest read counts. Activations, keys and values
do not count as bytes. `share_with_cache` also counts the keys and values of the context.
"""

from __future__ import annotations

import argparse
import json
from statistics import median

import torch
from cpu_gemm import machine, vector_isas
from model_speed import clock, model, since, whole

from haq_lab.hardware.huge_pages import huge_pages
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library
from haq_lab.int8.linear import Int8Linear
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.native_decoder import NativeStack


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stacks = [module for module in whole(model(), RTN()).modules() if isinstance(module, NativeStack)]
    kept = [stack.new_cache() for stack in stacks]
    weights = [m.packed for stack in stacks for m in stack.modules() if isinstance(m, Int8Linear)]
    size, layers = sum(packed.numel() for packed in weights), sum(len(stack.layers) for stack in stacks)
    data = huge_pages(size).fill_(1)
    readers = vector_isas()
    read_seconds: dict[str, list[tuple[float, float]]] = {isa: [] for isa in readers}
    hidden, angles = torch.randn(1, 1, stacks[0].width), torch.randn(1, 1, stacks[0].head_dim)
    layer_seconds: list[tuple[float, float]] = []
    for turn in range(arguments.rounds + 1):
        reader = readers[turn % len(readers)]
        with library.forced_isa(reader):
            start = clock()
            native.read_bytes(data)
            read = since(start)
        for keys in kept:
            keys.reserve([arguments.context + 1])
            keys.length, keys.stored = arguments.context, [arguments.context]
        start = clock()
        for stack, keys in zip(stacks, kept, strict=True):
            stack.step(hidden, angles, angles, keys)
        if turn:  # the first is a warm-up
            layer_seconds.append(since(start))
            read_seconds[reader].append(read)
    layer = [median(seconds) for seconds in zip(*layer_seconds, strict=True)]  # wall time and CPU time
    fastest = [min(median(seconds[i] for seconds in taken) for taken in read_seconds.values()) for i in (0, 1)]
    cache = 8 * arguments.context * sum(len(s.layers) * s.kv_heads * s.head_dim for s in stacks)  # float32, twice
    share = {name: r / s for name, r, s in zip(("wall", "cpu"), fastest, layer, strict=True)}
    result = {
        "machine": machine(),
        "isa": library.isa(),
        "threads": arguments.threads,
        "context": arguments.context,
        "layers": layers,
        "stacks": len(stacks),
        "bytes_per_layer": size // layers,
        "microseconds_per_layer": round(1e6 * layer[1] / layers, 1),
        "read_gb_per_s": round(size / fastest[1] / 1e9, 1),
        "share_of_read": {name: round(value, 3) for name, value in share.items()},
        "share_with_cache": {name: round(value * (1 + cache / size), 3) for name, value in share.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
