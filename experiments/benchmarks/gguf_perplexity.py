"""Compare the perplexity of a checkpoint with that of its GGUF export in llama.cpp. JSON as the last line.

    python experiments/benchmarks/gguf_perplexity.py checkpoints/smol

llama.cpp runs in the environment that `llama_cpp.py` builds, on the same token windows (Python's documentation). The
export is also measured after `gguf.quantize` has rounded its linears to new scales, as `llama-quantize` does.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def score(path: str, windows: list[list[int]]) -> float:
    """Return llama.cpp's perplexity of token windows. It runs in llama.cpp's environment."""
    import numpy as np
    from llama_cpp import Llama  # type: ignore[attr-defined]  # the package, not the file beside this one

    model = Llama(path, n_ctx=len(windows[0]) + 8, n_gpu_layers=0, logits_all=True, verbose=False)
    loss = 0.0
    for window in windows:
        model.reset()
        model.eval(window)
        logits = np.array(model.scores[: len(window) - 1], dtype=np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        loss += float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), window[1:]]).sum())
    return math.exp(loss / sum(len(window) - 1 for window in windows))


def ours(folder: Path, count: int, seqlen: int) -> tuple[float, list[list[int]]]:
    """Return our perplexity in int8 and the token windows."""
    import torch
    import torch.nn.functional as F

    import haq_lab
    from haq_lab.data.windows import PythonDocs

    model, tokenizer = haq_lab.load(folder, backend="cpu")
    windows = PythonDocs(windows=count, seqlen=seqlen).load(tokenizer).tokens
    with torch.no_grad():
        losses = [F.cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]) for window in windows]
    return math.exp(sum(map(float, losses)) / count), windows.tolist()


def requantize(path: Path) -> dict[str, float]:
    """Round the linears of an export to new scales, in place.

    Returns:
        The root mean square of the change, relative to that of the weights.
    """
    import gguf
    import numpy as np

    change = total = 0.0
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0 and tensor.name.startswith("blk."):
            before = gguf.dequantize(tensor.data, tensor.tensor_type)
            tensor.data[:] = gguf.quantize(before, tensor.tensor_type)
            after = gguf.dequantize(tensor.data, tensor.tensor_type)
            change += float(np.square(after - before, dtype=np.float64).sum())
            total += float(np.square(before, dtype=np.float64).sum())
    return {"requantised_relative_rms": math.sqrt(change / total)}


def scale_error(folder: Path) -> dict[str, float]:
    """Return the relative changes of the checkpoint's row scales when they are rounded to float16."""
    import torch

    from haq_lab.checkpoint.manifest import Manifest
    from haq_lab.storage.safetensors_file import read_shard

    scales = [
        tensor
        for shard in Manifest.read(folder).shards.values()
        for name, tensor in read_shard(folder, shard)[0].items()
        if name.endswith(".weight_scale")
    ]
    scale = torch.cat(scales).double()
    change = (scale.half().double() / scale - 1).abs()
    return {"scale_relative_rms": float(change.square().mean().sqrt()), "scale_relative_max": float(change.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--score", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.score:
        print(score(str(arguments.checkpoint), json.load(sys.stdin)))
        return

    from llama_cpp import environment

    from haq_lab.checkpoint.export.engines import export

    python = environment()

    def theirs(path: Path) -> float:
        # -I: this folder has a llama_cpp.py of its own, which must not be on the path.
        command: list[Any] = [python, "-I", __file__, path, "--score"]
        done = subprocess.run(command, input=json.dumps(windows), stdout=subprocess.PIPE, text=True, check=True)
        return float(done.stdout.splitlines()[-1])

    perplexity, windows = ours(arguments.checkpoint, arguments.windows, arguments.seqlen)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export(arguments.checkpoint, path, "gguf")
        again = Path(shutil.copyfile(path, Path(folder) / "again.gguf"))
        result = {
            "checkpoint": arguments.checkpoint.name,
            "windows": [arguments.windows, arguments.seqlen],
            "file_bytes": path.stat().st_size,
            **scale_error(arguments.checkpoint),
            **requantize(again),
            "perplexity": {"haq_lab": perplexity, "llama.cpp": theirs(path), "llama.cpp, requantised": theirs(again)},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
