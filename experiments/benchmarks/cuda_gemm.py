"""Compare the W8A8 products on a GPU with torch's int8 and fp16 products, and with the roofline.

    python experiments/benchmarks/cuda_gemm.py --hardware rtx4090

Only products with the same output are compared:

- `sums`: exact int32 sums. Ours (`accumulate`) beside torch's raw `torch._int_mm` (cuBLASLt).
- `linear`: fp16 outputs. Ours, with scales in the epilogue, beside torch's fp16 product.

A time is that of one call in a CUDA graph of 20 calls, so the GPU does not wait for the host between them. Each call
reads other weights, as the layers of a model do, so they do not come from the L2 cache. Rates count useful operations,
2 M N K, and no padding. The last line of the output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from haq_lab.hardware.spec import Hardware, load_hardware
from haq_lab.int8.cuda import device as cuda_device
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import GEMV_ROWS
from haq_lab.int8.cuda.roofline import least_seconds, useful_work
from haq_lab.utils.errors import UserError

LAYERS = {
    "attention": (4096, 4096),
    "expert up": (14336, 4096),
    "expert down": (4096, 14336),
}  # N, K of Mixtral-8x7B
ROWS = (1, 4, 8, 16, 64, 512, 2048)
CALLS = 20  # calls in a graph, and weights that they rotate over: 320 MiB of int8 at least, more than any L2 cache
INT_MM_ROWS = 17  # smallest number of rows that `torch._int_mm` takes
OUTPUT_BYTES = {"sums": 4, "linear": 2}

Product = Callable[[int], Tensor]  # from the number of the weights to the output


def products(
    m: int, n: int, k: int, kernels: Kernels, device: torch.device, weights: int = CALLS
) -> dict[str, Product]:
    """Return the products to compare.

    Args:
        m: Rows of activations.
        n: Rows of weights.
        k: Columns of both.
        kernels: The kernels of the device.
        device: The device.
        weights: Number of weight matrices.

    Returns:
        Functions from the number of a weight matrix to the output (m, n), by OUTPUT.NAME.
    """
    qx = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
    qw = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) for _ in range(weights)]
    sx, sw = torch.rand(m, device=device), torch.rand(n, device=device)
    x, w = qx.half(), [one.half() for one in qw]
    linear = kernels.gemv if m <= GEMV_ROWS else kernels.gemm
    calls: dict[str, Product] = {
        "sums.ours": lambda number: kernels.accumulate(qx, qw[number]),
        "linear.ours": lambda number: linear(qx, qw[number], sx, sw, None, torch.float16),
        "linear.fp16": lambda number: x @ w[number].t(),
    }
    if m >= INT_MM_ROWS:
        calls["sums.int_mm"] = lambda number: torch._int_mm(qx, qw[number].t())
    return calls


def median_seconds(product: Product, repeats: int) -> float:
    """Return the median seconds of one call, from replays of a graph of `CALLS` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture must not be the first use of a kernel
        product(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            product(number)
    seconds = []
    for _ in range(3 + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(seconds[3:])  # the first ones warm up


def measure(m: int, n: int, k: int, hardware: Hardware | None, repeats: int) -> dict[str, Any]:
    """Measure all products of one shape.

    Returns:
        Milliseconds and useful 10^12 operations per second of each product. With `hardware`, also the fraction of the
        roofline that ours reach.
    """
    row: dict[str, Any] = {"m": m, "n": n, "k": k}
    device = torch.device("cuda", torch.cuda.current_device())
    for name, product in products(m, n, k, cuda_device.kernels(), device).items():
        seconds = median_seconds(product, repeats)
        output, _, competitor = name.partition(".")
        row[f"{name}_ms"] = 1e3 * seconds
        row[f"{name}_tops"] = 2 * m * n * k / seconds / 1e12
        if hardware and competitor == "ours":
            work = useful_work(m, n, k, out_bytes=OUTPUT_BYTES[output], scales=output == "linear")
            row[f"{name}_of_roofline"] = least_seconds(work, hardware) / seconds
    return row


def main() -> int:
    """Run the benchmark. Returns 2 if there is no GPU that can run it, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", help="name of a profile in conf/hardware, for the fraction of the roofline")
    parser.add_argument("--repeats", type=int, default=50, help="number of replays of a graph")
    arguments = parser.parse_args()
    try:
        hardware = load_hardware(arguments.hardware) if arguments.hardware else None
        cuda_device.kernels()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    for layer, (n, k) in LAYERS.items():
        for m in ROWS:
            row = {"layer": layer, **measure(m, n, k, hardware, arguments.repeats)}
            rows.append(row)
            print(
                *(f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in row.items()), sep="  "
            )
    record = cuda_device.describe_gpu(torch.device("cuda", torch.cuda.current_device()))
    print(json.dumps({"benchmark": "cuda_gemm", "gpu": record, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
