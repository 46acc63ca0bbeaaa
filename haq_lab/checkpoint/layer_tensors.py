"""A quantised decoder layer as tensors, and back: bytes go straight into int8 modules."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.numerics import ActivationScheme
from haq_lab.models.experts import Experts
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.storage.safetensors_file import DTYPES
from haq_lab.utils.errors import UserError


def layer_content(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, ActivationScheme]]:
    """All tensors of a quantised layer by name, and the activation scheme of each int8 linear."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, Int8Linear)}
    tensors = {name: storable(tensor) for name, tensor in layer.state_dict().items()}
    return tensors, {name: linear.scheme for name, linear in linears.items()}


def int8_layer(
    model: LayeredModel,
    index: int,
    tensors: dict[str, Tensor],
    schemes: dict[str, ActivationScheme],
    backend: Backend,
    where: str,
) -> nn.Module:
    """Decoder layer `index` from its content, computing on `backend`.

    Raises:
        UserError: The content does not fit the model's config; `where` says in the message what it was read from.
    """
    layer, tensors = model.new_layer(index), dict(tensors)
    for name, scheme in schemes.items():
        parts = ("weight", "weight_scale", "bias", "input_scale")
        levels, scale, bias, input_scale = (tensors.pop(f"{name}.{part}", None) for part in parts)
        shape = cast(Tensor, layer.get_submodule(name).weight).shape
        if levels is None or scale is None or levels.shape != shape:
            raise UserError(f"checkpoint: {where}: '{model.family.layers}.{index}.{name}' does not fit the config")
        layer.set_submodule(name, Int8Linear(levels, scale, bias, scheme, input_scale, backend))
    if (moe := model.family.moe) is not None:
        layer.set_submodule(moe.experts, Int8Experts.of(cast(Experts, layer.get_submodule(moe.experts))))
    _assign(layer, tensors, where)
    return layer.requires_grad_(False)


def _assign(layer: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """What is not quantised: norms, and a router."""
    places = {name: tensor for name, tensor in layer.named_parameters() if tensor.is_meta}
    for name in sorted({*tensors} ^ {*places}):
        raise UserError(f"checkpoint: {where}: tensor '{name}' is superfluous or missing")
    for name, tensor in tensors.items():
        if tensor.shape != places[name].shape:
            raise UserError(f"checkpoint: {where}: tensor '{name}' does not fit the config")
        parent, _, own = name.rpartition(".")
        setattr(layer.get_submodule(parent), own, nn.Parameter(tensor, requires_grad=False))


def storable(tensor: Tensor) -> Tensor:
    """In a dtype that a shard has."""
    return tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)
