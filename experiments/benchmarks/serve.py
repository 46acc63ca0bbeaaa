"""Measure what `haq_lab.serve` adds to a token, relative to `generate` in the same run. The last line is JSON.

    OMP_NUM_THREADS=1 python experiments/benchmarks/serve.py checkpoints/smol

`generate`, an answer of the server and a streamed answer run in turn, at two lengths. The difference of the two lengths
gives the time of one token, without the time of a request. The client runs on the same machine. So use one compute
thread on two cores; otherwise the client and the kernels share a core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import httpx
from transformers import GenerationConfig

import haq_lab

LENGTHS = (32, 288)  # tokens
PROMPT = "Once upon a time"


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder of a quantised checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="times that each call is measured")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "haq_lab.serve", arguments.checkpoint, "--port=0", "--name=model"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = next(word for word in server.stdout.readline().split() if word.startswith("http")).rstrip(",")
    model, tokenizer = haq_lab.load(arguments.checkpoint)
    prompt = tokenizer(PROMPT, return_tensors="pt")

    def generate(settings: dict[str, object]) -> None:
        model.generate(**prompt, generation_config=GenerationConfig(**settings))  # type: ignore[operator]

    def request(settings: dict[str, object], stream: bool) -> None:
        body = {"model": "model", "prompt": PROMPT, "generation_config": json.dumps(settings), "stream": stream}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as answer:
            answer.raise_for_status()
            for _ in answer.iter_raw():
                pass

    calls: dict[str, Callable[[dict[str, object]], None]] = {
        "generate": generate,
        "answer": lambda settings: request(settings, stream=False),
        "streamed answer": lambda settings: request(settings, stream=True),
    }
    measured: dict[str, dict[int, list[float]]] = {name: {length: [] for length in LENGTHS} for name in calls}
    try:
        for turn in range(1 + arguments.rounds):
            for length in LENGTHS:
                settings: dict[str, object] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
                for name, call in calls.items():
                    spent = seconds(lambda call=call, settings=settings: call(settings))  # type: ignore[misc]
                    if turn:  # the first is a warm-up
                        measured[name][length].append(spent)
    finally:
        server.terminate()
        server.wait(30)
    short, long = LENGTHS
    record = {}
    for name, times in measured.items():
        pairs = zip(times[short], times[long], strict=True)
        tokens = sorted(1e3 * (after - before) / (long - short) for before, after in pairs)
        record[name] = {"ms_per_token": statistics.median(tokens), "lowest": tokens[0], "highest": tokens[-1]}
        added = 100 * (record[name]["ms_per_token"] / record["generate"]["ms_per_token"] - 1)
        print(
            f"{name}: {record[name]['ms_per_token']:.2f} ms/token ({tokens[0]:.2f} to {tokens[-1]:.2f}), {added:+.1f} %"
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
