"""Export a checkpoint as a GGUF file in Q8_0 or Q4_0, which llama.cpp reads.

Smoothing is folded into the weights and norms of a checkpoint, so they are an ordinary model. A block of Q8_0 has 32
int8 levels and a float16 scale. It stores our levels unchanged, and the scale of their row rounded to float16. So the
linears differ from ours by at most 2^-11 of a value if the scale is at least 2^-14. Rounding the dequantised weights
to new scales, as `llama-quantize` does, would add the error of a second 8-bit rounding.

4-bit weights are stored in Q4_0 in the same manner: a block of 32 gets the scale of its group. If a checkpoint has
4-bit and 8-bit weights, all are stored in Q8_0.

llama.cpp quantises activations to 8 bits in blocks of 32, whatever the checkpoint's activation scheme. The embedding
and the head are rounded to Q8_0, as `convert_hf_to_gguf.py --outtype q8_0` does. Rows that are not a multiple of 32
long are stored in float16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from haq_lab.checkpoint.export.gguf_metadata import Architecture, add_model, architecture_of, frequency_factors
from haq_lab.checkpoint.export.gguf_tokenizer import add_tokenizer
from haq_lab.checkpoint.layer_tensors import read_layer
from haq_lab.checkpoint.manifest import layer_file
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.weight_format import INT8
from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.errors import UserError

BLOCK = 32  # levels that share a scale in Q8_0 and Q4_0


class GgufTensor(NamedTuple):
    """A tensor as a GGUF file stores it. Data of type Q8_0 or Q4_0 are bytes."""

    name: str
    data: np.ndarray
    type: Type


def export_gguf(model: QuantizedModel, target: Path) -> None:
    """Export a checkpoint to the new file `target`, with one layer in memory at a time.

    Args:
        model: The checkpoint. An int8 head is exported as the float head that it was rounded from.
        target: A file name that ends with `.gguf`.

    Raises:
        UserError: A file is damaged, or llama.cpp cannot run the model or its tokenizer.
    """
    if target.suffix != ".gguf":
        raise UserError(f"export --for gguf: '{target}' does not end with .gguf. Name a file, such as model.gguf.")
    architecture = architecture_of(model)
    outer = list(_outer_tensors(model, architecture))
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.number])
    add_model(writer, model)
    add_tokenizer(writer, model, rows=len(cast(Tensor, model.shell.get_input_embeddings().weight)))
    for tensor in outer:
        _add_info(writer, tensor)
    narrow = all(format.bits == 4 for layer in model.weight_formats() for format in layer.values())
    names = _announce_layers(writer, model, architecture, narrow)
    with atomic_file(target) as temporary, closing(writer):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in outer:
            writer.write_tensor_data(tensor.data)
        for index, announced in enumerate(names):
            tensors = _layer_tensors(model, architecture, index, narrow)
            for tensor, name in zip(tensors, announced, strict=True):
                assert tensor.name == name, f"{tensor.name} is written in place of {name}"
                writer.write_tensor_data(tensor.data)


def _announce_layers(
    writer: gguf.GGUFWriter, model: QuantizedModel, architecture: Architecture, narrow: bool
) -> list[list[str]]:
    """Add the shapes of all layers' tensors to the header, from those of layer 0. Return their names by layer.

    The header stands before the data, and all layers of a model have the same tensors.
    """
    names = []
    first = list(_layer_tensors(model, architecture, 0, narrow))
    for index in range(model.depth):
        layer = [tensor._replace(name=tensor.name.replace("blk.0.", f"blk.{index}.")) for tensor in first]
        for tensor in layer:
            _add_info(writer, tensor)
        names.append([tensor.name for tensor in layer])
    return names


def _add_info(writer: gguf.GGUFWriter, tensor: GgufTensor) -> None:
    writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.type)


def _outer_tensors(model: QuantizedModel, architecture: Architecture) -> Iterator[GgufTensor]:
    for name, tensor in model.read_outer_tensors().items():
        yield _float_tensor(_gguf_name(model, architecture, name), tensor, quantize=tensor.dim() == 2)
    if (factors := frequency_factors(model)) is not None:
        yield _float_tensor("rope_freqs.weight", factors)


def _layer_tensors(model: QuantizedModel, architecture: Architecture, index: int, narrow: bool) -> Iterator[GgufTensor]:
    """Yield the tensors of a layer in an order that is the same for all layers; linears in Q4_0 if `narrow`."""
    tensors, forms, formats = read_layer(model.folder, model.manifest.shard(model.folder, layer_file(index)))
    shapes, prefix = model.new_layer(index), f"{model.family.layers}.{index}."
    experts: dict[str, dict[int, GgufTensor]] = defaultdict(dict)
    for linear in forms:
        format = formats.get(linear, INT8)
        stored, scale = tensors.pop(f"{linear}.{format.tensor}"), tensors.pop(f"{linear}.weight_scale")
        tensors.pop(f"{linear}.input_scale", None)
        rows = architecture.row_order(linear, model.config)
        expert = expert_of(linear)
        name = _gguf_name(model, architecture, f"{linear}.weight".replace(f".experts.{expert}.", ".experts."))
        columns = cast(nn.Linear, shapes.get_submodule(linear.removeprefix(prefix))).in_features
        levels, scales = format.levels(stored, columns), format.row_scales(scale, columns)
        converted = quantized_tensor(name, levels[rows], scales[rows], narrow)
        if expert is None:
            yield converted
        else:
            experts[name][expert] = converted
    for name, parts in experts.items():
        yield GgufTensor(name, np.stack([parts[number].data for number in sorted(parts)]), parts[0].type)
    for name, tensor in tensors.items():  # norms, router and biases
        rows = architecture.row_order(name.rpartition(".")[0], model.config)
        yield _float_tensor(_gguf_name(model, architecture, name), tensor[rows])


def quantized_tensor(name: str, levels: Tensor, scale: Tensor, narrow: bool = False) -> GgufTensor:
    """Return a quantised linear in Q8_0 or Q4_0, or in float16 if its rows are not a multiple of 32 long.

    Args:
        name: Name of the tensor in the file.
        levels: int8 (n, k).
        scale: float32 (n, 1) or (n, k), constant in each block.
        narrow: Whether to use Q4_0, for levels in [-8, 7].
    """
    n, k = levels.shape
    if k % BLOCK:
        return GgufTensor(name, (levels * scale).to(torch.float16).numpy(), Type.F16)
    scales = scale.expand(n, k)[:, ::BLOCK].numpy()
    blocked = levels.view(n, -1, BLOCK).numpy()
    if not narrow:
        blocks = np.empty(scales.shape, dtype=[("scale", "<f2"), ("levels", "i1", BLOCK)])
        blocks["scale"], blocks["levels"] = scales, blocked
        return GgufTensor(name, blocks.view(np.uint8).reshape(n, -1), Type.Q8_0)
    nibbles = (blocked + 8).astype(np.uint8)  # the first half of a block is in the lower halves of the bytes
    blocks = np.empty(scales.shape, dtype=[("scale", "<f2"), ("levels", "u1", BLOCK // 2)])
    blocks["scale"], blocks["levels"] = scales, nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    return GgufTensor(name, blocks.view(np.uint8).reshape(n, -1), Type.Q4_0)


def _float_tensor(name: str, tensor: Tensor, quantize: bool = False) -> GgufTensor:
    data = tensor.float().contiguous().numpy()
    kind = Type.F32 if not quantize else Type.F16 if data.shape[-1] % BLOCK else Type.Q8_0
    return GgufTensor(name, gguf.quantize(data, kind), kind)


_name_map = cache(gguf.get_tensor_name_map)


def _gguf_name(model: QuantizedModel, architecture: Architecture, name: str) -> str:
    module, _, kind = name.rpartition(".")
    theirs = _name_map(architecture.number, model.depth).get_name(module)
    if theirs is None:
        raise UserError(f"export --for gguf: llama.cpp has no tensor for '{name}'. Choose --for transformers.")
    return f"{theirs}.{kind}"
