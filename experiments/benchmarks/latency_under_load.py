"""Check that a latency ratio holds on a busy machine, and that the bare latency is marked. The last line is JSON.

    python experiments/benchmarks/latency_under_load.py                      # both loads, 1 and 2 threads: five minutes
    python experiments/benchmarks/latency_under_load.py --loads spin --threads 1 --seconds 10

A run measures SmolLM2-135M in int8 against full precision on a quiet machine. An identical run follows for each load.
A load is as many busy processes as there are processors. `spin` computes in registers. `memory` also copies memory,
which slows both models by contention. Each run is a process of its own.

The exit code is 1 if a ratio under load differs by more than 5 % from the quiet one. It is also 1 if a bare latency
under load is not marked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpu_gemm import machine

from haq_lab.measure.disturbance import disturbances

LOADS = {
    "spin": "while True: pass",
    "memory": "import numpy as np; a = np.ones(1 << 25); b = np.empty_like(a)\nwhile True: np.copyto(b, a)",
}
LIMIT = 0.05  # largest relative difference of the ratios
DECODE, PREFILL = "latency.speed_vs_fp.decode", "latency.speed_vs_fp.prefill"
MILLISECONDS = "latency.decode_ms_per_token.mean"


@contextmanager
def busy(code: str, count: int) -> Iterator[None]:
    """Keep a number of processes busy within the block."""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=alone) for _ in range(count)]
    try:
        time.sleep(2)  # they import and allocate meanwhile
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(folder: Path, threads: int, seconds: float, wait: float) -> dict[str, Any]:
    """Run one measurement in a process of its own and return its metrics."""
    settings = [
        "model=smol quantizer=rtn tracking=none measure=[latency] measure.latency.against=none",
        f"measure.latency.seconds={seconds} measure.latency.prompt_tokens=128 measure.latency.decode_tokens=16",
        f"measure.latency.wait={wait} result_cache.dir={folder.parent / 'cache'} hydra.run.dir={folder}",
    ]
    command = [sys.executable, "-m", "haq_lab", *" ".join(settings).split()]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, stdout=subprocess.DEVNULL)
    metrics: dict[str, Any] = json.loads((folder / "results.json").read_text())["metrics"]
    return metrics


def row(load: str, threads: int, metrics: dict[str, Any], quiet: dict[str, Any]) -> dict[str, Any]:
    """Return what a run shows, beside the quiet run."""
    return {
        "load": load,
        "threads": threads,
        "decode_ms": metrics[MILLISECONDS],
        "decode_ms_over_quiet": metrics[MILLISECONDS] / quiet[MILLISECONDS],
        "marked": bool(disturbances(metrics)),
        "why": disturbances(metrics),
        **{
            f"{name.rpartition('.')[2]}{suffix}": value
            for name in (DECODE, PREFILL)
            for suffix, value in (
                ("_x_fp32", metrics[name]),
                ("_stderr", metrics[f"{name}.stderr"]),
                ("_change", metrics[name] / quiet[name] - 1),
            )
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=[*LOADS])
    parser.add_argument("--seconds", type=float, default=20, help="seconds that each run measures")
    parser.add_argument("--wait", type=float, default=60, help="seconds that the quiet run waits for a quiet moment")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="busy processes of a load")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for threads in given.threads:
            quiet = measure(Path(name) / f"quiet-{threads}", threads, given.seconds, given.wait)
            rows.append(row("quiet", threads, quiet, quiet))
            for load in given.loads:
                with busy(LOADS[load], given.processes):
                    metrics = measure(Path(name) / f"{load}-{threads}", threads, given.seconds, 0)
                rows.append(row(load, threads, metrics, quiet))
            for one in rows[-1 - len(given.loads) :]:
                mark = "~" if one["marked"] else ""
                print(
                    f"{one['threads']} threads, {one['load']:<7} decode {mark}{one['decode_ms']:.2f} ms, "
                    f"{one['decode_x_fp32']:.3f} ± {one['decode_stderr']:.3f} x fp32 ({one['decode_change']:+.1%}), "
                    f"prefill {one['prefill_x_fp32']:.3f} x fp32 ({one['prefill_change']:+.1%})",
                    flush=True,
                )
    loaded = [one for one in rows if one["load"] != "quiet"]
    passed = all(one["marked"] and abs(one["decode_change"]) <= LIMIT for one in loaded)
    print(
        json.dumps({"machine": machine(), "processes": given.processes, "limit": LIMIT, "passed": passed, "rows": rows})
    )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
