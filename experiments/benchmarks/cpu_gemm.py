"""Compare our int8 products on the CPU with torch's. The last line is JSON.

    python experiments/benchmarks/cpu_gemm.py --threads 1

Decode (M = 1 to 4): the rate at which weights stream from memory, divided by the read bandwidth. The bandwidth is
measured between the runs, with the fastest way to read. Each shape rotates over matrices of `--pool-mb` in total,
which do not fit the last cache. `share_of_read` makes one call after another, as the layers of a deployed model do
(cpu_stream.cpp, one thread). `through_python` makes each call from Python.

Prefill (M = 512): time relative to fp32 `torch.mm`, and to torch's exact int8 product `torch._int_mm`, alone
(`accumulate`) and with torch's quantisation and epilogue (`linear`).

The runs of a comparison are interleaved, and the best counts. `spread` is large on a busy machine.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from haq_lab.hardware.huge_pages import huge_pages
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.build import build, compiler

# (N, K) of SmolLM2-135M (q and o; k and v; gate and up; down; head) and Mixtral (w1; w2); then q/k/v and
# gate/up of SmolLM2 as one.
PREFILL = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576), (14336, 4096), (4096, 14336)]
DECODE = [*PREFILL, (960, 576), (3072, 576)]


def machine() -> str:
    """Return the name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def vector_isas() -> list[str]:
    """Return the instruction sets of this CPU, without the scalar one."""
    return [isa for isa in library.isas() if isa != "scalar"]


def times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the (best, median) seconds of each call. The calls run in turn."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first is a warm-up
                took[name].append(time.perf_counter() - start)
    return {name: (min(t), sorted(t)[len(t) // 2]) for name, t in took.items()}


def at(isa: str, call: Callable[[], object]) -> Callable[[], object]:
    """Return the call, bound to an instruction set."""

    def run() -> None:
        with library.forced_isa(isa):
            call()

    return run


def torch_int8(x: torch.Tensor, qw: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute the product in torch: quantise the rows, call `_int_mm` on the transposed view, and scale."""
    sx = x.abs().amax(dim=1, keepdim=True) / 127
    q = torch.round(x / sx).clamp(-127, 127).to(torch.int8)
    return torch._int_mm(q, qw.t()).float() * sx * scale


def prefill(n: int, k: int, m: int, repeats: int) -> dict:
    """Return ratios at M rows. A value above 1 is faster than the baseline after `over`."""
    x, qw = torch.randn(m, k), torch.randint(-127, 128, (n, k), dtype=torch.int8)
    qx, w, scale, out = (
        torch.randint(-127, 128, (m, k), dtype=torch.int8),
        qw.float(),
        torch.rand(n),
        torch.empty(m, n),
    )
    sums = torch.empty(m, n, dtype=torch.int32)
    packed = native.pack(qw)
    linear = native.Linear(packed, scale)
    exact = torch.equal(torch._int_mm(qx, qw.t()), native.accumulate(qx, packed))
    calls: dict[str, Callable[[], object]] = {
        "fp32": lambda: torch.mm(x, w.t(), out=out),
        "int_mm": lambda: torch._int_mm(qx, qw.t(), out=sums),
        "torch_int8": lambda: torch_int8(x, qw, scale),
        "accumulate": lambda: native.accumulate(qx, packed, sums),
    }
    calls |= {isa: at(isa, lambda: linear(x, out)) for isa in vector_isas()}
    took = times(calls, repeats)
    best = {name: t[0] for name, t in took.items()}
    return {
        "N": n,
        "K": k,
        "M": m,
        "int_mm_exact_here": exact,
        "gops": {name: round(2e-9 * m * n * k / t, 1) for name, t in best.items()},
        "accumulate_over_int_mm": round(best["int_mm"] / best["accumulate"], 3),
        "linear_over_torch_int8": round(best["torch_int8"] / best[library.isa()], 3),
        "linear_over_fp32": {i: round(best["fp32"] / best[i], 2) for i in library.isas() if i in best},
        "spread": round(max(median / least for least, median in took.values()), 2),
    }


def stream_driver(folder: Path) -> Path:
    """Compile cpu_stream.cpp and return the program."""
    driver = folder / "cpu_stream"
    source = Path(__file__).with_name("cpu_stream.cpp")
    subprocess.run([*compiler(), "-std=c++17", "-O2", str(source), "-o", str(driver), "-ldl"], check=True)
    return driver


def decode(driver: Path, n: int, k: int, pool: int, repeats: int) -> dict:
    """Return the weight bytes per second divided by the read bandwidth, at M = 1 to 4."""
    shares: dict[str, dict[str, float]] = {}
    for isa in vector_isas():
        with library.forced_isa(isa):
            command = map(str, [driver, build(), library.level(), n, k, pool, repeats])
        rates = json.loads(subprocess.run([*command], check=True, capture_output=True).stdout)
        read = rates.pop("read")
        shares[isa] = {m: round(rate / read, 3) for m, rate in rates.items()}
    return {
        "N": n,
        "K": k,
        "read_gb_per_s": round(read / 1e9, 1),
        "share_of_read": shares,
        "through_python": through_python(n, k, pool, repeats),
    }


def through_python(n: int, k: int, pool: int, repeats: int) -> dict[str, float]:
    """Return the same with the best instruction set and one call from Python per product."""
    count = max(1, pool // (n * k))
    plain, laid = huge_pages(count * n * k).fill_(1), huge_pages(count * n * k).view(count, n * k)
    packed = native.pack(torch.randint(-127, 128, (n, k), dtype=torch.int8)).data
    linears = [native.Linear(native.Packed(place.copy_(packed), n, k), torch.rand(n)) for place in laid]

    def rotate(m: int) -> Callable[[], None]:
        x, out = torch.randn(m, k), torch.empty(m, n)

        def run() -> None:
            for linear in linears:
                linear(x, out)

        return run

    reads = {isa: at(isa, lambda: native.read_bytes(plain)) for isa in vector_isas()}
    took = times(reads | {f"M={m}": rotate(m) for m in (1, 2, 3, 4)}, repeats)
    read = min(took.pop(isa)[0] for isa in reads)
    return {name: round(read / best, 3) for name, (best, _) in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pool-mb", type=int, default=600, help="MB of weights per shape to rotate over")
    parser.add_argument("--only", choices=["prefill", "decode"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    result: dict = {
        "machine": machine(),
        "threads": arguments.threads,
        "isas": library.isas(),
        "torch": torch.__version__,
    }
    if arguments.only != "decode":
        result["prefill"] = []
        for n, k in PREFILL:
            result["prefill"].append(prefill(n, k, 512, arguments.repeats))
            print(result["prefill"][-1], flush=True)
    if arguments.only != "prefill":
        result["decode"] = []
        with TemporaryDirectory() as folder:
            driver = stream_driver(Path(folder))
            for n, k in DECODE:
                result["decode"].append(decode(driver, n, k, arguments.pool_mb << 20, arguments.repeats))
                print(result["decode"][-1], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
