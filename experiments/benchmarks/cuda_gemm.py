"""W8A8 products on a GPU against torch's int8 (cuBLASLt, `torch._int_mm`) and fp16 products, and against the roofline.

    python experiments/benchmarks/cuda_gemm.py --hardware rtx4090

Times are medians by CUDA events, with the L2 cache emptied before each call. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch

from haq_lab.hardware.spec import Hardware, load_hardware
from haq_lab.int8.cuda import device
from haq_lab.int8.cuda import kernels as cuda
from haq_lab.int8.cuda.launch import choose_split, choose_tile
from haq_lab.int8.cuda.roofline import gemm_work, gemv_work, least_seconds
from haq_lab.utils.errors import UserError

LAYERS = {
    "attention": (4096, 4096),
    "expert up": (14336, 4096),
    "expert down": (4096, 14336),
}  # N, K of Mixtral-8x7B
ROWS = (1, 4, 8, 16, 64, 512, 2048)


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `call` on a cold L2 cache."""
    scratch = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times = []
    for repeat in range(repeats + 3):
        scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(m: int, n: int, k: int, hardware: Hardware | None, repeats: int) -> dict:
    """One shape, all competitors in one run."""
    kernels = device.kernels()
    qx = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    qw = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    sx, sw = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
    x, w = qx.half(), qw.half()
    call = kernels.gemv if m <= cuda.GEMV_ROWS else kernels.gemm
    row: dict = {"m": m, "n": n, "k": k}
    row["ours_ms"] = median_ms(lambda: call(qx, qw, sx, sw, None, torch.float16), repeats)
    row["fp16_ms"] = median_ms(lambda: x @ w.t(), repeats)
    if m > 16:  # torch's int8 product takes no fewer rows; its scales are applied apart
        row["int_mm_ms"] = median_ms(lambda: (torch._int_mm(qx, qw.t()).float() * sx[:, None] * sw).half(), repeats)
    if hardware:
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        tile = choose_tile(m, n, multiprocessors)
        split = choose_split(m, n, k, tile, multiprocessors)
        work = gemv_work(m, n, k) if m <= cuda.GEMV_ROWS else gemm_work(m, n, k, tile, split=split)
        row["roofline_ms"] = 1e3 * least_seconds(work, hardware)
        row["fraction_of_roofline"] = row["roofline_ms"] / row["ours_ms"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", help="a name from conf/hardware, for the fraction of the roofline")
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    try:
        hardware = load_hardware(arguments.hardware) if arguments.hardware else None
        device.kernels()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    for layer, (n, k) in LAYERS.items():
        for m in ROWS:
            row = {"layer": layer, **measure(m, n, k, hardware, arguments.repeats)}
            rows.append(row)
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
            )
    print(json.dumps({"benchmark": "cuda_gemm", "device": torch.cuda.get_device_name(), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
