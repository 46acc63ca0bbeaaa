"""Export a checkpoint in the compressed-tensors format, which transformers and vLLM read.

Format: https://github.com/vllm-project/compressed-tensors

Dense models are exported as `int-quantized`, with int8 weights and activations. MoE models are exported as
`pack-quantized`, with 8-bit weights only. transformers loads only packed experts and fuses them, and its fused
experts have no activation scheme. Tensors have the names of the architecture's hub checkpoints.

The tests compare the export, loaded by transformers, with our model. The weights are identical. With weight-only
quantisation, the logits agree with our weights in float arithmetic to 1e-5. With static activation scales, they agree
with our logits to 1 %. Dynamic scales agree less, because compressed-tensors divides a row's maximum by 127.5 and we
divide it by 127.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from haq_lab.checkpoint.layer_tensors import read_layer
from haq_lab.checkpoint.manifest import layer_file
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.numerics import ActivationScheme
from haq_lab.models.architectures import Moe
from haq_lab.models.companion_files import copy_companion_files
from haq_lab.storage.hf_shard_writer import ShardWriter
from haq_lab.utils.atomic_files import atomic_folder, write_json
from haq_lab.utils.errors import UserError

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = {
    "token": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "tensor": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": True},
    "static": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
}


def export(folder: Path, target: Path) -> None:
    """Export the checkpoint in `folder` to the new folder `target`, with one layer in memory at a time.

    Args:
        folder: A checkpoint that `checkpoint.dir` has written.
        target: Folder to create.

    Raises:
        UserError: The checkpoint is damaged or has an int8 head, or `target` already exists.
    """
    if target.exists():
        raise UserError(f"export: '{target}' already exists. Choose a new folder.")
    model = QuantizedModel(folder, ReferenceBackend())
    if model.int8_head is not None:
        raise UserError(
            f"export: the head of '{folder}' is quantised, which the export does not support. "
            "Quantise the model with quantizer.lm_head=false."
        )
    packed = model.family.moe is not None
    schemes: dict[str, ActivationScheme] = {}
    with atomic_folder(target) as aside:
        writer = ShardWriter(aside, model.depth + 1)
        writer.add(model.read_outer_tensors())
        for index in range(model.depth):
            tensors, layer_schemes = read_layer(folder, model.manifest.shard(folder, layer_file(index)))
            schemes |= layer_schemes
            converted = _convert_layer(tensors, layer_schemes, packed)
            writer.add({model.family.checkpoint_name(name): tensor for name, tensor in converted.items()})
        writer.finish()
        copy_companion_files(model, aside)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ours = config["quantization_config"]
        config["dtype"] = ours["dtype"]
        names = {name: model.family.checkpoint_name(f"{name}.").rstrip(".") for name in schemes}
        config["quantization_config"] = _quantization(schemes, names, model.family.moe) | {
            "haq_lab": ours["provenance"]
        }
        write_json(aside / "config.json", config)


def _convert_layer(tensors: dict[str, Tensor], schemes: dict[str, ActivationScheme], packed: bool) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in schemes and kind == "weight_scale":
            converted[name] = tensor[:, None]
        elif module in schemes and kind == "input_scale":
            if not packed:
                converted[name] = tensor.reshape(1)
        elif module in schemes and kind == "weight" and packed:
            converted[f"{module}.weight_packed"] = pack(tensor)
            converted[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
        else:
            converted[name] = tensor
    return converted


def pack(levels: Tensor) -> Tensor:
    """Pack int8 weights (n, k) into int32 words (n, ceil(k / 4)), as compressed-tensors' `pack_to_int32` does.

    A word has four levels, each plus 128. The first one is in the lowest byte. The last word is padded with zeros.
    """
    unsigned = levels.view(torch.uint8).bitwise_xor(128)
    return F.pad(unsigned, (0, -levels.shape[1] % 4)).view(torch.int32)


def _quantization(schemes: dict[str, ActivationScheme], names: dict[str, str], moe: Moe | None) -> dict[str, Any]:
    """Return the `quantization_config`, with one group of linears for each activation scheme."""
    groups: dict[str, dict[str, Any]] = {
        scheme: {
            "targets": ["Linear"] if len({*schemes.values()}) == 1 else [names[name] for name in own],
            "weights": WEIGHTS,
            "input_activations": ACTIVATIONS[scheme],
        }
        for scheme, own in _by_scheme(schemes).items()
    }
    if moe is not None:
        groups = {"all": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}}
    router = (Moe.router if moe is None else moe.router).rpartition(".")[2]  # matches nothing in a dense model
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if moe is None else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", rf"re:.*\.{router}$"],
    }


def _by_scheme(schemes: dict[str, ActivationScheme]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    return groups
