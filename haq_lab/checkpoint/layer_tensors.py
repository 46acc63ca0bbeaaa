"""Convert a quantised decoder layer to named tensors and build a layer from them."""

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
    """Return the tensors of a quantised layer by name, and the activation scheme of each int8 linear by name."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, Int8Linear)}
    tensors = {name: to_storable(tensor) for name, tensor in layer.state_dict().items()}
    return tensors, {name: linear.scheme for name, linear in linears.items()}


def int8_layer(
    model: LayeredModel,
    index: int,
    tensors: dict[str, Tensor],
    schemes: dict[str, ActivationScheme],
    backend: Backend,
    where: str,
) -> nn.Module:
    """Build decoder layer `index` from its tensors, without a float copy of the weights.

    Args:
        model: The model that the layer belongs to.
        index: Index of the layer.
        tensors: Tensors by name, as `layer_content` returns them.
        schemes: Activation scheme of each int8 linear by name.
        backend: Backend that computes the int8 linears.
        where: Source of the tensors, for error messages.

    Raises:
        UserError: The tensors do not fit the model's config.
    """
    layer, tensors = model.new_layer(index), dict(tensors)
    for name, scheme in schemes.items():
        parts = ("weight", "weight_scale", "bias", "input_scale")
        levels, scale, bias, input_scale = (tensors.pop(f"{name}.{part}", None) for part in parts)
        shape = cast(Tensor, layer.get_submodule(name).weight).shape
        if levels is None or scale is None or levels.shape != shape:
            raise UserError(
                f"checkpoint: {where}: '{model.family.layers}.{index}.{name}' does not fit the config. "
                "Write the checkpoint again."
            )
        layer.set_submodule(name, Int8Linear(levels, scale, bias, scheme, input_scale, backend))
    if (moe := model.family.moe) is not None:
        layer.set_submodule(moe.experts, Int8Experts.of(cast(Experts, layer.get_submodule(moe.experts))))
    _assign(layer, tensors, where)
    return layer.requires_grad_(False)


def _assign(layer: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Assign the tensors that are not quantised: norms and a router."""
    parameters = {name: tensor for name, tensor in layer.named_parameters() if tensor.is_meta}
    for name in sorted({*tensors} ^ {*parameters}):
        problem = "missing" if name in parameters else "superfluous"
        raise UserError(f"checkpoint: {where}: tensor '{name}' is {problem}. Write the checkpoint again.")
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise UserError(
                f"checkpoint: {where}: tensor '{name}' does not fit the config. Write the checkpoint again."
            )
        parent, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(parent), attribute, nn.Parameter(tensor, requires_grad=False))


def to_storable(tensor: Tensor) -> Tensor:
    """Return the tensor in a dtype that a shard can store. Other types are converted to float32."""
    return tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)
