"""Export a checkpoint in the compressed-tensors format, which transformers and vLLM read.

Format: https://github.com/vllm-project/compressed-tensors. Tensors have the names of the architecture's hub
checkpoints, with one tensor per expert.

Most exports are `int-quantized`, with int8 weights and activations. An MoE model for transformers is
`pack-quantized`, with 8-bit weights only. transformers loads only packed experts and fuses them, and its fused
experts have no activation scheme. A checkpoint with 4-bit weights is `pack-quantized` too, because the engines'
kernels for packed weights compute with 16-bit activations.

vLLM's int8 experts (`CompressedTensorsW8A8Int8MoEMethod`) take one dynamic scale per token only. Its int8 linears
(`CompressedTensorsW8A8Int8`) take dynamic scales per token, or one static scale.

The tests compare the export, loaded by transformers, with our model. The weights are identical. With weight-only
quantisation, the logits agree with our weights in float arithmetic to 1e-5. With static activation scales, they agree
with our logits to 1 %. Dynamic scales agree less, because compressed-tensors divides a row's maximum by 127.5 and we
divide it by 127.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haq_lab.checkpoint.layer_tensors import LayerContent, read_layer
from haq_lab.checkpoint.manifest import layer_file
from haq_lab.checkpoint.model import QuantizedModel, quantization_of
from haq_lab.int8.numerics import ActivationScheme
from haq_lab.int8.weight_format import GROUPS, INT8, WeightFormat
from haq_lab.models.companion_files import copy_companion_files
from haq_lab.models.experts import Experts, fuse_experts
from haq_lab.models.families.family import Moe
from haq_lab.storage.hf_shard_writer import ShardWriter
from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.atomic_files import atomic_folder, write_json
from haq_lab.utils.errors import UserError

WEIGHTS: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = {
    "token": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "tensor": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": True},
    "static": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
}
Schemes = dict[str, ActivationScheme]
Formats = dict[str, WeightFormat]


def export_for_transformers(model: QuantizedModel, target: Path) -> None:
    """Export a checkpoint to the new folder `target` for transformers. MoE and 4-bit models keep only their weights.

    Raises:
        UserError: A file is damaged, the model has an int8 head, or a group of 4-bit weights does not fit.
    """
    _export(model, target)


def export_for_vllm(model: QuantizedModel, target: Path) -> None:
    """Export a checkpoint to the new folder `target` for vLLM, with int8 activations unless it has 4-bit weights.

    Raises:
        UserError: A file is damaged, the model has an int8 head, vLLM has no int8 kernel for an activation scheme, or a
            group of 4-bit weights does not fit.
    """
    _export(model, target, for_vllm=True)


def _export(model: QuantizedModel, target: Path, for_vllm: bool = False) -> None:
    if model.int8_head is not None:
        raise UserError(
            f"export: the head of '{model.folder}' is quantised, which the export does not support. "
            "Quantise the model with quantizer.lm_head=false."
        )
    moe = model.family.moe if model.experts else None
    if for_vllm and moe is not None and moe.fused:
        raise UserError(
            f"export: the experts of a '{model.config.model_type}' are fused in its checkpoints, and vLLM has no int8 "
            "kernels for them. Choose --for transformers, which gets them in 16 bits."
        )
    formats = _formats(model)
    narrow = any(format.bits == 4 for format in formats.values())
    packed = narrow or (moe is not None and not for_vllm)
    schemes: Schemes = {}
    with atomic_folder(target) as aside:
        writer = ShardWriter(aside, model.depth + 1)
        writer.add(model.read_outer_tensors())
        for index in range(model.depth):
            content = read_layer(model.folder, model.manifest.shard(model.folder, layer_file(index)))
            layer_schemes = {name: form.scheme for name, form in content.forms.items()}
            if for_vllm and not packed:
                _refuse_schemes_without_vllm_kernel(layer_schemes, moe)
            schemes |= layer_schemes
            content = _without_fused_experts(content, model, index)
            converted = _convert_layer(content, packed, _widths(model, index))
            writer.add({model.family.checkpoint_name(name): tensor for name, tensor in converted.items()})
        writer.finish()
        copy_companion_files(model, aside)
        config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
        ours = config["quantization_config"]
        config["dtype"] = ours["dtype"]
        groups = _weight_groups(formats, model) if packed else _scheme_groups(schemes, model)
        config["quantization_config"] = _quantization(groups, packed, model) | {"haq_lab": ours["provenance"]}
        write_json(aside / "config.json", config)


def _formats(model: QuantizedModel) -> Formats:
    """Return the weight format of each quantised linear by its full name.

    Raises:
        UserError: The experts of a layer differ, which no engine's fused experts support.
    """
    formats: Formats = {}
    for index, own in enumerate(model.weight_formats()):
        if len({format for name, format in own.items() if expert_of(name) is not None}) > 1:
            raise UserError(
                f"export: the experts of layer {index} of '{model.folder}' have different numbers of bits, which fused "
                "experts do not support. Quantise the model with quantizer.weight_bits=4 or 8."
            )
        formats |= {f"{model.family.layers}.{index}.{name}": format for name, format in own.items()}
    return formats


def _refuse_schemes_without_vllm_kernel(schemes: Schemes, moe: Moe | None) -> None:
    allowed = ("token", "static") if moe is None else ("token",)
    for name, scheme in schemes.items():
        if scheme not in allowed:
            kind = "dense models" if moe is None else "MoE models"
            raise UserError(
                f"export: '{name}' has {scheme} activation scales, but vLLM's int8 kernels for {kind} need "
                f"{' or '.join(allowed)} scales. Quantise the model with quantizer.activations=token."
            )


def _widths(model: QuantizedModel, index: int) -> dict[str, int]:
    """Return the number of inputs of each linear of a layer by its full name."""
    linears = dict(model.new_layer(index).named_modules()).items()
    prefix = f"{model.family.layers}.{index}."
    return {prefix + name: linear.in_features for name, linear in linears if isinstance(linear, nn.Linear)}


def _convert_layer(content: LayerContent, packed: bool, widths: dict[str, int]) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in content.tensors.items():
        module, _, kind = name.rpartition(".")
        if module in content.forms and kind == "weight_scale":
            converted[name] = tensor[:, None] if tensor.dim() == 1 else tensor.t().contiguous()
        elif module in content.forms and kind == "input_scale":
            if not packed:
                converted[name] = tensor.reshape(1)
        elif module in content.forms and kind == "weight" and packed:
            converted[f"{module}.weight_packed"] = pack(tensor)
            converted[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
        elif module in content.forms and kind == "weight_packed":
            _must_divide(module, content.formats[module].group, widths[module])
            converted[name] = F.pad(tensor, (0, -tensor.shape[1] % 4)).view(torch.int32)
            converted[f"{module}.weight_shape"] = torch.tensor((len(tensor), widths[module]))
        else:
            converted[name] = tensor
    return converted


def _must_divide(module: str, group: int | None, columns: int) -> None:
    """Raise UserError if the width of 4-bit weights is not a multiple of their group."""
    if group is None or columns % group == 0:
        return
    fitting = [str(other) for other in GROUPS if columns % other == 0]
    choice = f"quantizer.group={fitting[0]}" if fitting else "quantizer.group=none"
    raise UserError(
        f"export: '{module}' has {columns} inputs, which are not a multiple of its group of {group}. "
        f"compressed-tensors has no shorter last group. Quantise the model with {choice}."
    )


def pack(levels: Tensor) -> Tensor:
    """Pack int8 weights (n, k) into int32 words (n, ceil(k / 4)), as compressed-tensors' `pack_to_int32` does.

    A word has four levels, each plus 128. The first one is in the lowest byte. The last word is padded with zeros.
    """
    unsigned = levels.view(torch.uint8).bitwise_xor(128)
    return F.pad(unsigned, (0, -levels.shape[1] % 4)).view(torch.int32)


def _without_fused_experts(content: LayerContent, model: QuantizedModel, index: int) -> LayerContent:
    """Return a layer's content with experts in floats and fused, if transformers reads them only so."""
    prefix, moe = f"{model.family.layers}.{index}.", model.moe_of(index)
    if moe is None or not moe.fused:
        return content
    content = content.renamed(lambda name: name.removeprefix(prefix))
    tensors, layer, dtype = dict(content.tensors), model.new_layer(index), _stored_dtype(model)
    for name in [name for name in content.forms if expert_of(name) is not None]:
        format, width = content.formats.get(name, INT8), cast(nn.Linear, layer.get_submodule(name)).in_features
        levels = format.levels(tensors.pop(f"{name}.{format.tensor}"), width)
        scales = format.row_scales(tensors.pop(f"{name}.weight_scale"), width)
        tensors.pop(f"{name}.input_scale", None)
        tensors[f"{name}.weight"] = (levels * scales).to(dtype)
    layout = cast(Experts, layer.get_submodule(moe.experts)).layout
    forms = {name: form for name, form in content.forms.items() if expert_of(name) is None}
    rest = LayerContent(fuse_experts(tensors, moe, layout), forms, content.formats)
    return rest.renamed(lambda name: prefix + name)


def _stored_dtype(model: QuantizedModel) -> torch.dtype:
    """Return the type of the floats of the checkpoint that was quantised."""
    return getattr(torch, str(quantization_of(model.folder)["dtype"] or "float32"))


def _quantization(groups: dict[str, Any], packed: bool, model: QuantizedModel) -> dict[str, Any]:
    """Return the `quantization_config` with the given groups of linears."""
    moe = model.family.moe
    router = (Moe.router if moe is None else moe.router).rpartition(".")[2]  # matches nothing in a dense model
    in_float = {name for index in range(model.depth) for name in model.kinds.float_linears(index)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(rf"re:.*\.{re.escape(name)}$" for name in sorted({router, *in_float}))],
    }


def _weight_groups(formats: Formats, model: QuantizedModel) -> dict[str, Any]:
    """Return one group of linears for each weight format. Their activations are not quantised."""
    linears: dict[WeightFormat, list[str]] = {}
    for name, format in formats.items():
        linears.setdefault(format, []).append(model.family.checkpoint_name(f"{name}.").rstrip("."))
    groups = {}
    for format, names in linears.items():
        weights = WEIGHTS | {"num_bits": format.bits}
        if format.group is not None:
            weights |= {"strategy": "group", "group_size": format.group}
        key = "all" if len(linears) == 1 else f"{format.bits}_bits"
        targets = ["Linear"] if len(linears) == 1 else names
        groups[key] = {"targets": targets, "weights": weights, "input_activations": None}
    return groups


def _scheme_groups(schemes: Schemes, model: QuantizedModel) -> dict[str, Any]:
    """Return one group of linears for each activation scheme."""
    linears: dict[ActivationScheme, list[str]] = {}
    for name, scheme in schemes.items():
        linears.setdefault(scheme, []).append(model.family.checkpoint_name(f"{name}.").rstrip("."))
    return {
        scheme: {
            "targets": ["Linear"] if len(linears) == 1 else names,
            "weights": WEIGHTS,
            "input_activations": ACTIVATIONS[scheme],
        }
        for scheme, names in linears.items()
    }
