"""A quantised model made ready to run: what can be computed together is, and nothing is held twice.

    whole = deploy(model.assemble(layers), model, backend)

Linears that read one tensor become one product (`joint`), on every backend and without changing a bit. On a CPU with
our kernels the weights lie side by side in memory, and the layers become one call (`decoder`). On a GPU norms and
activations are fused with the quantizing that follows, and a layer's experts run together (`fused`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.linear import Int8Linear, MergedLinear, can_merge
from haq_lab.models.architectures import Group, Moe
from haq_lab.models.experts import Expert
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.runtime.equivalence import is_silu
from haq_lab.runtime.fusion import fuse
from haq_lab.runtime.layer_parts import LayerParts
from haq_lab.runtime.native_decoder import stack_of, stacked
from haq_lab.runtime.native_router import native_router

if TYPE_CHECKING:
    from haq_lab.models.layerwise import LayeredModel


def deploy(whole: nn.Module, model: LayeredModel, backend: Backend) -> nn.Module:
    """Move an assembled model to the backend's device; merge, fuse and stack its layers. In place; returns it."""
    whole.to(backend.device)
    layers = list(whole.get_submodule(model.family.layers).children())
    for layer in layers:
        merge_linears(layer, model.groups)
        specify_swiglu(layer, backend)
        if model.family.moe is not None:
            make_router_native(layer, model.family.moe, backend)
        fuse(layer, model.groups, backend)
    lay_side_by_side(layers)
    block = None if model.family.moe is None else model.family.moe.block
    parts = []
    for layer in layers:
        part = LayerParts.of(layer, model.groups, model.family)
        parts.append(part if part and stack_of([layer], [part], 0, block).reproduces_its_layers() else None)
    whole.set_submodule(model.family.layers, nn.ModuleList(stacked(layers, parts, block)))
    return whole


def merge_linears(layer: nn.Module, groups: Iterable[Group]) -> None:
    """Join the linears of a decoder layer that read one tensor, by the family's groups, in place.

    Not those of experts: each reads the tokens that chose it.
    """
    for group in groups:
        members = [layer.get_submodule(name) for name in group.parts().get(None, ())]
        linears = [member for member in members if isinstance(member, Int8Linear)]
        if linears and len(linears) == len(members) and can_merge(linears):
            MergedLinear(linears)


def specify_swiglu(layer: nn.Module, backend: Backend) -> None:
    """Let a layer's int8 experts have the backend's SwiGLU between their products, where that is their activation.

    Its bits are the same on every backend, and it is one with what stands around it: on a CPU a call an expert.
    """
    for module in layer.modules():
        if isinstance(module, Int8Experts):
            module.swiglu = is_silu(cast(Expert, module[0]).act_fn, backend)


def make_router_native(layer: nn.Module, moe: Moe, backend: Backend) -> None:
    """Replace the router of int8 experts by our kernel, where the backend has it and it does the same."""
    if not isinstance(layer.get_submodule(moe.experts), Int8Experts):
        return
    router = native_router(layer.get_submodule(moe.router), backend)
    if router is not None:
        layer.set_submodule(moe.router, router)


def lay_side_by_side(layers: Iterable[nn.Module]) -> None:
    """Move packed weights into one stretch of huge pages, in the order in which they are read.

    One linear after the other: a page of the new place is taken when it is written, so that little is held twice.
    """
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, Int8Linear)]
    holders = dict.fromkeys(linear.merged or linear for linear in linears if linear.backend.native)
    if holders:
        sizes = [holder.packed.numel() for holder in holders]
        for holder, place in zip(holders, native.huge_pages(sum(sizes)).split(sizes), strict=True):
            holder.hold(place.view_as(holder.packed).copy_(holder.packed))
