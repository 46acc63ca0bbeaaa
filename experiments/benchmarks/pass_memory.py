"""Peak memory of the one pass over a Mixtral-shaped checkpoint, at several depths; JSON as the last line.

    python experiments/benchmarks/pass_memory.py --depths 4 16 64
    python experiments/benchmarks/pass_memory.py --depths 46 --hidden 1024 --quantizer rtn      # 8.4 GB in bf16

The checkpoints are random, in bf16, a shard a layer, with Mixtral's proportions (8 experts, inner width 3.5 times
the hidden one) and removed afterwards. Each depth runs in a process of its own; layers that are finished are let
go, as if written out. `layer_bytes` is one layer in float32, `base_bytes` the process before the pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from haq_lab.calibration.statistics import Policy
from haq_lab.int8.cpu import CpuBackend
from haq_lab.measure.memory import peak_rss, reset_peaks
from haq_lab.models.families import family_of
from haq_lab.models.layered import LayeredModel
from haq_lab.onepass import one_pass
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.haq import HAQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothquant import SmoothQuant

QUANTIZERS = {"rtn": RTN, "smoothquant": SmoothQuant, "gptq": GPTQ, "haq": HAQ}
WINDOW = 128


def write_checkpoint(folder: Path, depth: int, hidden: int) -> int:
    """A random checkpoint, written layer by layer; returns its bytes."""
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        max_position_embeddings=2048,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    family, where = family_of(config), {}
    with torch.device("meta"):
        one = MixtralConfig(**{**config.to_dict(), "num_hidden_layers": 1})
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(one).state_dict().items()}

    def add(file: str, names: dict[str, torch.Size]) -> None:
        tensors = {}
        for name, shape in names.items():
            ones = len(shape) == 1  # norms
            values = torch.ones(shape) if ones else torch.randn(shape) / shape[-1] ** 0.5
            tensors |= separate(name, values.bfloat16(), family.checkpoint_name)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))

    add("outside.safetensors", {name: shape for name, shape in shapes.items() if ".layers." not in name})
    for layer in range(depth):
        own = {name.replace(".layers.0.", f".layers.{layer}."): x for name, x in shapes.items() if ".layers." in name}
        add(f"layer-{layer}.safetensors", own)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def separate(name: str, values: torch.Tensor, rename) -> dict[str, torch.Tensor]:
    """A tensor as the hub's checkpoints hold it: experts one by one."""
    prefix, _, last = name.rpartition(".")
    if last not in ("gate_up_proj", "down_proj"):
        return {rename(name): values}
    split = {}
    for number, own in enumerate(values):
        parts = (
            {"down_proj": own}
            if last == "down_proj"
            else dict(zip(("gate_proj", "up_proj"), own.chunk(2), strict=True))
        )
        split |= {rename(f"{prefix}.{number}.{part}.weight"): x.contiguous().clone() for part, x in parts.items()}
    return split


def measure(folder: Path, quantizer: str, windows: int) -> None:
    """The pass, in a process that does nothing else; prints its peak."""
    torch.set_num_threads(1)
    model = LayeredModel(folder)
    tokens = torch.randint(0, 1024, (2 * windows, WINDOW), generator=torch.Generator().manual_seed(0))
    reset_peaks()
    base = peak_rss()
    evaluation = {"random": tokens[windows:]}
    passed = one_pass(
        model, QUANTIZERS[quantizer](), CpuBackend(), tokens[:windows], Policy(), evaluation, lambda index, layer: None
    )
    layer_bytes = sum(tensor.nbytes for tensor in model.load_layer(0).state_dict().values())
    result = {"base_bytes": base, "peak_bytes": peak_rss(), "layer_bytes": layer_bytes, "linears": len(passed.reports)}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--quantizer", choices=list(QUANTIZERS), default="gptq")
    parser.add_argument(
        "--windows", type=int, default=4, help=f"of {WINDOW} tokens, for calibration and evaluation each"
    )
    parser.add_argument("--folder", type=Path, help="a checkpoint that is there already (the child process's)")
    chosen = parser.parse_args()
    if chosen.folder:
        measure(chosen.folder, chosen.quantizer, chosen.windows)
        return
    rows = []
    for depth in chosen.depths:
        with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
            size = write_checkpoint(Path(folder), depth, chosen.hidden)
            command = [sys.executable, __file__, "--folder", folder, "--quantizer", chosen.quantizer]
            command += ["--windows", str(chosen.windows)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({"depth": depth, "checkpoint_bytes": size, **json.loads(told.splitlines()[-1])})
        peak, base = rows[-1]["peak_bytes"], rows[-1]["base_bytes"]
        print(f"depth {depth}: checkpoint {size / 1e6:,.0f} MB, peak {peak / 1e6:,.0f} MB ({base / 1e6:,.0f} before)")
    print(json.dumps({"quantizer": chosen.quantizer, "hidden": chosen.hidden, "runs": rows}))


if __name__ == "__main__":
    main()
