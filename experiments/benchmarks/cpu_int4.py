"""Compare 4-bit with 8-bit weights on the CPU. The last line is JSON.

    python experiments/benchmarks/cpu_int4.py --threads 1

For each shape, group and number of rows: the time with int8 weights divided by the time with 4-bit weights. For few
rows, each shape rotates over matrices of `--pool-mb` of int8 weights, which do not fit the last cache, so reading the
weights is the limit. `bytes` is the ratio of the bytes read, scales included, and so the largest ratio to expect. The
runs are interleaved, and the best counts.
"""

import argparse
import json
from collections.abc import Callable

import torch
from cpu_gemm import machine, times

from haq_lab.hardware.huge_pages import huge_pages
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library
from haq_lab.int8.weight_format import INT8, WeightFormat

# (N, K): q/k/v, gate/up and down of SmolLM2-135M; Mixtral's w1.
SHAPES = [(960, 576), (3072, 576), (576, 1536), (14336, 4096)]
FORMATS = {"int8": INT8, **{f"int4, {group}": WeightFormat(4, group) for group in (128, 64, 32)}}


def linears(n: int, k: int, format: WeightFormat, count: int) -> list[native.Linear]:
    """Return linears whose weights lie side by side, as `deploy` places them."""
    levels = torch.randint(-7, 8, (n, k), dtype=torch.int8)
    packed = native.pack(levels, format).data
    places = huge_pages(count * packed.numel()).view(count, -1)
    scales = torch.rand(count, *format.scale_shape(n, k))
    return [
        native.Linear(native.Packed(place.copy_(packed), n, k, format), scale)
        for place, scale in zip(places, scales, strict=True)
    ]


def ratios(n: int, k: int, m: int, pool: int, repeats: int) -> dict[str, float]:
    """Return the time of int8 divided by that of each 4-bit format, for M rows."""
    count = max(1, pool // (n * k)) if m <= 8 else 1
    x, out = torch.randn(m, k), torch.empty(m, n)

    def all_of(some: list[native.Linear]) -> Callable[[], None]:
        def run() -> None:
            for linear in some:
                linear(x, out)

        return run

    took = times({name: all_of(linears(n, k, format, count)) for name, format in FORMATS.items()}, repeats)
    base = took.pop("int8")[0]
    return {name: round(base / best, 2) for name, (best, _) in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pool-mb", type=int, default=300, help="MB of int8 weights per shape to rotate over")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    result: dict = {"machine": machine(), "threads": arguments.threads, "ratios": []}
    result["bytes"] = {name: round(8 / (4 + 32 / format.group), 2) for name, format in FORMATS.items() if format.group}
    for isa in (isa for isa in library.isas() if isa != "scalar"):
        with library.forced_isa(isa):
            for n, k in SHAPES:
                for m in (1, 2, 4, 8, 512):
                    row = {"isa": isa, "N": n, "K": k, "M": m}
                    row |= ratios(n, k, m, arguments.pool_mb << 20, arguments.repeats)
                    result["ratios"].append(row)
                    print(row, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
