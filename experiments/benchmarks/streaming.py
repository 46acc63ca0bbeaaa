"""Measure the peak memory of quantising Mixtral-shaped checkpoints: at several depths, and under a memory limit.

    python experiments/benchmarks/streaming.py --depths 4 16 64
    python experiments/benchmarks/streaming.py --hidden 2048 --intermediate 5632 --depths 16 --limit-gb 5

Each run is a separate process. The limit applies to its private memory (RLIMIT_DATA). The peak is that of the
resident set, which includes the file pages mapped while a layer is read. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig

from haq_lab.models.random_tiny import byte_tokenizer
from haq_lab.storage.hf_shard_writer import ShardWriter

EXPERTS = 8


def write_checkpoint(folder: Path, depth: int, hidden: int, intermediate: int) -> int:
    """Write a Mixtral in bfloat16 whose layers all have the same random weights. Return its bytes."""
    config = MixtralConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        num_local_experts=EXPERTS,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).bfloat16()

    layer = {f"self_attn.{name}_proj.weight": drawn(hidden, hidden) for name in "qo"}
    layer |= {f"self_attn.{name}_proj.weight": drawn(hidden // 2, hidden) for name in "kv"}
    layer["block_sparse_moe.gate.weight"] = drawn(EXPERTS, hidden)
    for expert in range(EXPERTS):
        for name, shape in {"w1": (intermediate, hidden), "w2": (hidden, intermediate)}.items():
            layer[f"block_sparse_moe.experts.{expert}.{name}.weight"] = drawn(*shape)
        layer[f"block_sparse_moe.experts.{expert}.w3.weight"] = drawn(intermediate, hidden)
    layer |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), torch.ones(hidden).bfloat16())
    writer = ShardWriter(folder, depth + 1)
    writer.add({"model.embed_tokens.weight": drawn(257, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()})
    for index in range(depth):
        writer.add({f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()})
    writer.finish()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def quantise(model: Path, work: Path, quantizer: str, limit_gb: float | None) -> dict[str, Any]:
    """Run the command line on `model` and write a checkpoint. Return the metrics of the run."""
    settings = [
        f"model=hf model.name={model} quantizer={quantizer} tracking=none measure=[perplexity]",
        "calibration.samples=2 calibration.seqlen=128 data.python_docs.windows=1 data.python_docs.seqlen=128",
        f"checkpoint.dir={work / 'checkpoint'} hydra.run.dir={work / 'run'}",
    ]

    def limited() -> None:
        if limit_gb is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 1e9), int(limit_gb * 1e9)))

    code = "from haq_lab.measure.memory import peak_rss; from haq_lab.cli.main import main; main(); print(peak_rss())"
    command = [sys.executable, "-c", code, *" ".join(settings).split()]
    outcome = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise SystemExit(f"{model.name} did not end well:\n{outcome.stderr[-2000:]}")
    metrics = json.loads((work / "run" / "results.json").read_text())["metrics"]
    return metrics | {"peak_rss_bytes": int(outcome.stdout.split()[-1])}


def measure(
    depths: list[int], hidden: int, intermediate: int, quantizer: str, limit_gb: float | None, folder: Path
) -> list[dict[str, Any]]:
    """Return one row per depth."""
    rows = []
    for depth in depths:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            model, work = Path(name) / "model", Path(name) / "work"
            model.mkdir()
            size = write_checkpoint(model, depth, hidden, intermediate)
            metrics = quantise(model, work, quantizer, limit_gb)
        row = {"depth": depth, "checkpoint_gb": size / 1e9, "peak_rss_gb": metrics["peak_rss_bytes"] / 1e9}
        print(
            f"depth {depth:>3}: {row['checkpoint_gb']:.3f} GB in bfloat16, peak {row['peak_rss_gb']:.3f} GB", flush=True
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--quantizer", default="smoothquant")
    parser.add_argument("--limit-gb", type=float)
    parser.add_argument("--folder", type=Path, help="folder for the temporary checkpoints")
    given = parser.parse_args()
    rows = measure(given.depths, given.hidden, given.intermediate, given.quantizer, given.limit_gb, given.folder)
    peaks = [row["peak_rss_gb"] for row in rows]
    print(json.dumps({"limit_gb": given.limit_gb, "rows": rows, "growth": max(peaks) / peaks[0] - 1}))


if __name__ == "__main__":
    main()
