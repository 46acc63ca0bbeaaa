"""Convert a quantised decoder layer to named tensors and build a layer from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import InputForm, Int8Linear
from haq_lab.int8.numerics import ActivationScheme
from haq_lab.int8.rotation import NO_ROTATION, block_size
from haq_lab.int8.weight_format import INT8, WeightFormat
from haq_lab.models.experts import Experts
from haq_lab.models.families.family import Group
from haq_lab.models.families.lookup import head_size
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.prefix.attention import KEYS, VALUES, attach
from haq_lab.storage.json_form import parse_json
from haq_lab.storage.safetensors_file import DTYPES, Shard, read_shard
from haq_lab.utils.errors import UserError

# Metadata of a layer's file, as JSON: each quantised linear's activation scheme, its input's rotation if it has one,
# and its weights' format if they have 4 bits.
SCHEMES, ROTATIONS, FORMATS = "schemes", "rotations", "weight_formats"
_SCHEMES, _ROTATIONS = TypeAdapter(dict[str, ActivationScheme]), TypeAdapter(dict[str, int])
_FORMATS = TypeAdapter(dict[str, WeightFormat])
Forms = dict[str, InputForm]  # by the name of a quantised linear
Formats = dict[str, WeightFormat]


class LayerContent(NamedTuple):
    """A quantised layer as it is stored.

    Attributes:
        tensors: All tensors by name.
        forms: How each quantised linear takes its input, by name.
        formats: The format of the weights of each linear by name. A linear that is not listed has 8-bit weights.
    """

    tensors: dict[str, Tensor]
    forms: Forms
    formats: Formats

    def renamed(self, rename: Callable[[str], str]) -> LayerContent:
        """Return the same content with other names."""
        tensors, forms, formats = ({rename(name): part for name, part in named.items()} for named in self)
        return LayerContent(tensors, forms, formats)  # type: ignore[arg-type]

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the layer's file."""
        formats = {name: asdict(format) for name, format in self.formats.items()}
        return form_metadata(self.forms) | ({FORMATS: json.dumps(formats)} if formats else {})


def layer_content(layer: nn.Module) -> LayerContent:
    """Return the content of a quantised layer."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, Int8Linear)}
    return LayerContent(
        {name: to_storable(tensor) for name, tensor in layer.state_dict().items()},
        {name: linear.input_form for name, linear in linears.items()},
        {name: linear.format for name, linear in linears.items() if linear.format != INT8},
    )


def read_layer(folder: Path, shard: Shard, buffer: Tensor | None = None) -> LayerContent:
    """Return the content of a layer's file, by full names.

    Args:
        folder: The checkpoint folder.
        shard: The file's entry in the manifest.
        buffer: Memory for the file, as `read_shard` takes it.

    Raises:
        UserError: The file is missing or damaged.
    """
    tensors, metadata = read_shard(folder, shard, buffer)
    path = folder / shard.file
    return LayerContent(tensors, read_forms(metadata, path), read_formats(metadata, path))


def form_metadata(forms: Forms) -> dict[str, str]:
    """Return the metadata of a layer's file, which `read_forms` reads."""
    schemes = {name: form.scheme for name, form in forms.items()}
    rotations = {name: form.rotation for name, form in forms.items() if form.rotation != NO_ROTATION}
    return {SCHEMES: json.dumps(schemes)} | ({ROTATIONS: json.dumps(rotations)} if rotations else {})


def read_forms(metadata: dict[str, str], path: Path) -> Forms:
    """Return how each quantised linear of a file takes its input. Empty for a file that is not a layer.

    Raises:
        UserError: The metadata is damaged. The message names `path`.
    """
    try:
        schemes = parse_json(metadata.get(SCHEMES, "{}"), _SCHEMES)
        rotations = parse_json(metadata.get(ROTATIONS, "{}"), _ROTATIONS)
        return {name: InputForm(scheme, rotations.get(name, NO_ROTATION)) for name, scheme in schemes.items()}
    except ValueError as error:
        raise UserError(f"checkpoint: {path}: the schemes are not readable ({error}). Write it again.") from error


def read_formats(metadata: dict[str, str], path: Path) -> Formats:
    """Return the format of the weights of each linear of a file that has not 8 bits.

    Raises:
        UserError: The metadata is damaged. The message names `path`.
    """
    try:
        return parse_json(metadata.get(FORMATS, "{}"), _FORMATS)
    except ValueError as error:
        raise UserError(f"checkpoint: {path}: the formats are not readable ({error}). Write it again.") from error


def int8_layer(
    model: LayeredModel,
    index: int,
    content: LayerContent,
    backend: Backend,
    where: str,
) -> nn.Module:
    """Build decoder layer `index` from its content, without a float copy of the weights.

    Only the int8 weights may share memory with the content, if the backend does not change their layout.

    Args:
        model: The model that the layer belongs to.
        index: Index of the layer.
        content: The content, as `layer_content` returns it.
        backend: Backend that computes the int8 linears.
        where: Source of the tensors, for error messages.

    Raises:
        UserError: The tensors do not fit the model's config.
    """
    layer = model.new_layer(index)
    linears = dict(layer.named_modules())
    formats = {name: content.formats.get(name, INT8) for name in content.forms}
    weights = {f"{name}.{format.tensor}" for name, format in formats.items()}
    tensors = {name: tensor if name in weights else tensor.clone() for name, tensor in content.tensors.items()}
    for name in _merged_first(content.forms, model.groups_of(index)):
        form, format = content.forms[name], formats[name]
        parts = (format.tensor, "weight_scale", "bias", "input_scale")
        stored, scale, bias, input_scale = (tensors.pop(f"{name}.{part}", None) for part in parts)
        linear = linears.get(name)
        if not isinstance(linear, nn.Linear) or not _fit(linear, form, format, stored, scale, bias, input_scale):
            raise UserError(
                f"checkpoint: {where}: '{model.family.layers}.{index}.{name}' does not fit the config. "
                "Write the checkpoint again."
            )
        levels = format.levels(cast(Tensor, stored), linear.in_features)
        given = levels, cast(Tensor, scale), bias, form.scheme, input_scale, backend
        layer.set_submodule(name, Int8Linear(*given, rotation=form.rotation, format=format))
    if (moe := model.moe_of(index)) is not None:
        layer.set_submodule(moe.experts, Int8Experts.of(cast(Experts, layer.get_submodule(moe.experts))))
    if model.prefix is not None:
        attach(layer.get_submodule(model.family.attention), *_prefix_states(model, tensors, where))
    _assign(layer, tensors, where)
    return layer.requires_grad_(False)


def _prefix_states(model: LayeredModel, tensors: dict[str, Tensor], where: str) -> list[Tensor]:
    """Remove the keys and values of the prefix from a layer's tensors and return them, (heads, p, head_dim) each."""
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    shape = 1, heads, len(model.prefix or ()), head_size(model.config)
    states = []
    for name in (f"{model.family.attention}.{KEYS}", f"{model.family.attention}.{VALUES}"):
        if not _has(tensor := tensors.pop(name, None), shape, torch.float32):
            problem = "is missing" if tensor is None else "does not fit the config"
            raise UserError(f"checkpoint: {where}: tensor '{name}' {problem}. Write the checkpoint again.")
        states.append(cast(Tensor, tensor)[0])
    return states


def _merged_first(names: Iterable[str], groups: Iterable[Group]) -> list[str]:
    """Sort the names of linears. Those that will be merged come first, because they must be packed side by side."""
    merged = [name for group in groups for name in group.consumers_by_expert().get(None, ())]
    order = {name: place for place, name in enumerate(merged)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _fit(
    linear: nn.Linear,
    form: InputForm,
    format: WeightFormat,
    stored: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
) -> bool:
    """Return whether stored tensors have the shapes and types of a linear with this input form and weight format."""
    shape = linear.out_features, linear.in_features
    return (
        block_size(linear.in_features, max(form.rotation, NO_ROTATION)) == form.rotation
        and _has(stored, format.stored_shape(*shape), torch.int8 if format.bits == 8 else torch.uint8)
        and _has(scale, format.scale_shape(*shape), torch.float32)
        and (bias is None or _has(bias, (linear.out_features,), torch.float32))
        and (_has(input_scale, (), torch.float32) if form.scheme == "static" else input_scale is None)
    )


def _has(tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> bool:
    return tensor is not None and tensor.shape == torch.Size(shape) and tensor.dtype == dtype


def _assign(layer: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Assign the tensors that are not quantised, such as norms and a router."""
    wanted = {name: tensor for name, tensor in [*layer.named_parameters(), *layer.named_buffers()] if tensor.is_meta}
    for name in sorted({*tensors} ^ {*wanted}):
        problem = "missing" if name in wanted else "superfluous"
        raise UserError(f"checkpoint: {where}: tensor '{name}' is {problem}. Write the checkpoint again.")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"checkpoint: {where}: tensor '{name}' does not fit the config. Write the checkpoint again."
            )
        parent, _, attribute = name.rpartition(".")
        is_parameter = isinstance(wanted[name], nn.Parameter)
        own = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        setattr(layer.get_submodule(parent), attribute, own)


def to_storable(tensor: Tensor) -> Tensor:
    """Return the tensor in a dtype that a shard can store. Other types are converted to float32."""
    return tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)
