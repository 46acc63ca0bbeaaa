"""Time loading a checkpoint, beside reading and hashing its files, and the way to the first token.

    python experiments/benchmarks/load.py checkpoints/smol

Each time is the fastest of several, because another process on the machine only adds to it. The first load of a process
also imports the model's code, so it has its own line. `first token` is a new process from its start to the first token.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from haq_lab.config.backends import make_backend
from haq_lab.pipeline.deployment import load_checkpoint

IMPORTS = {
    "torch": "import torch",
    "transformers' Auto classes": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "the same and haq_lab.hf": "import haq_lab.hf; from transformers import AutoModelForCausalLM, AutoTokenizer",
    "the class of the model": "from transformers import LlamaForCausalLM",
    "haq_lab's loader": "import haq_lab.pipeline.deployment",
}
FIRST_TOKEN = """
import sys
import haq_lab
model, tokenizer = haq_lab.load(sys.argv[1], "cpu")
model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=1, do_sample=False)
"""


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read_and_hash(folder: Path) -> None:
    """Read all files of a checkpoint and compute their SHA-256, one after the other."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as stream:
                hashlib.file_digest(stream, "sha256")


def process(code: str, *arguments: str) -> float:
    """Return the wall time of a new Python process."""
    return seconds(lambda: subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True))


def main() -> None:
    """Measure and print the times."""
    parser = argparse.ArgumentParser(description="Time loading a checkpoint.")
    parser.add_argument("folder", type=Path, help="a checkpoint of haq_lab.quantize or checkpoint.dir")
    parser.add_argument("--repeats", type=int, default=5, help="how often to measure each time (default: 5)")
    options = parser.parse_args()
    folder, repeats = options.folder, options.repeats
    backend = make_backend("cpu")
    result = {
        "checkpoint_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "first_load_s": seconds(lambda: load_checkpoint(folder, backend)),
    }
    hashing, loading = [], []
    for _ in range(repeats):
        hashing.append(seconds(lambda: read_and_hash(folder)))
        loading.append(seconds(lambda: load_checkpoint(folder, backend)))
    result |= {"read_and_hash_s": min(hashing), "load_s": min(loading), "ratio": min(loading) / min(hashing)}
    for name, code in IMPORTS.items():
        result[f"import {name}"] = min(process(code) for _ in range(repeats))
    result["first_token_s"] = min(process(FIRST_TOKEN, str(folder)) for _ in range(repeats))
    for name, value in result.items():
        print(f"{name:40} {value:16,.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
