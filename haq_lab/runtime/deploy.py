"""Prepare a quantised model to run: merge linears, fuse kernels and stack layers.

    whole = deploy(model.assemble(layers), model, backend)

On every backend, linears that read the same tensor become one product, which is bit-identical (`MergedLinear`).
On a CPU with the native kernels, weights move to contiguous memory, consecutive layers become one call
(`native_decoder`), and the float head becomes native (`native_head`). On a GPU, norms and activations are fused with
the quantization after them, and a layer's experts run together (`fusion`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, cast

from torch import nn

from haq_lab.hardware.huge_pages import huge_pages
from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import Int8Linear, MergedLinear, can_merge
from haq_lab.models.experts import Expert
from haq_lab.models.families.family import Group, Moe
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.runtime.equivalence import computation_key, is_swiglu
from haq_lab.runtime.fusion import fuse
from haq_lab.runtime.layer_parts import LayerParts, UnsupportedLayerError
from haq_lab.runtime.native_decoder import make_stack, stack_native_layers
from haq_lab.runtime.native_head import make_head_native
from haq_lab.runtime.native_router import native_router


def deploy(
    whole: nn.Module, model: LayeredModel, backend: Backend, report: Callable[[str], None] | None = None
) -> nn.Module:
    """Move an assembled model to the backend's device and prepare it to run. The model is changed in place.

    Args:
        whole: The model, from `LayeredModel.assemble`.
        model: Its description.
        backend: The backend of its int8 linears.
        report: Called at most once, with one line that says why the native decoder is not used for some layers.

    Returns:
        `whole`.
    """
    whole.to(backend.device)
    layers = list(whole.get_submodule(model.family.layers).children())
    for index, layer in enumerate(layers):
        merge_linears(layer, model.groups_of(index))
        specify_swiglu(layer, backend)
        if (moe := model.moe_of(index)) is not None:
            make_router_native(layer, moe, model.config, backend)
        fuse(layer, model.groups_of(index), backend)
    make_head_native(whole, backend)
    move_to_huge_pages(layers)
    parts: list[LayerParts | None] = []
    reasons: dict[int, str] = {}
    pairs: dict[Hashable, bool] = {}
    for index, layer in enumerate(layers):
        try:
            parts.append(_native_parts(layer, index, model, pairs))
        except UnsupportedLayerError as error:
            parts.append(None)
            reasons[index] = str(error)
    _refuse_some_windows(parts, reasons)
    if reasons and report is not None and not backend.uses_gpu:
        report(_notice(reasons, len(layers), backend))
    kinds = getattr(model.config, "layer_types", None)
    stacked = stack_native_layers(layers, parts, model.family.moe, kinds)
    whole.set_submodule(model.family.layers, nn.ModuleList(stacked))
    return whole


def _native_parts(layer: nn.Module, index: int, model: LayeredModel, pairs: dict[Hashable, bool]) -> LayerParts:
    """Describe a layer to the native decoder.

    Args:
        layer: The decoder layer.
        index: Its index.
        model: The model's description.
        pairs: `LayerParts.pairs` of the layers that the decoder reproduces, by computation key. Layers with these keys
            are not run.

    Raises:
        UnsupportedLayerError: The decoder cannot reproduce the layer.
    """
    parts, key = LayerParts.of(layer, model.groups_of(index), model.family), computation_key(layer)
    if key in pairs:
        parts.pairs = pairs[key]
        return parts
    for found in (False, True):
        parts.pairs = found
        if make_stack([layer], [parts], 0, model.family.moe).reproduces_its_layers():
            pairs[key] = found
            return parts
    raise UnsupportedLayerError("the native kernels do not reproduce its output")


def _refuse_some_windows(parts: list[LayerParts | None], reasons: dict[int, str]) -> None:
    """Make no layer with a sliding window native if one is not, in place.

    transformers makes one attention mask for all of them, whose size follows from the first one's KV cache.
    """
    if None in parts:
        for index, part in enumerate(parts):
            if part is not None and part.window:
                parts[index], reasons[index] = None, "other layers are not native, and it has a sliding window"


def _notice(reasons: Mapping[int, str], depth: int, backend: Backend) -> str:
    """Say why the native decoder is not used, by the first layer's reason."""
    if not backend.native:
        return f"native decoder not used: {backend.why_not_native}"
    first, reason = next(iter(reasons.items()))
    which = "" if len(reasons) == depth else f" for {len(reasons)} of {depth} layers"
    return f"native decoder not used{which}: layer {first}: {reason}"


def merge_linears(layer: nn.Module, groups: Iterable[Group]) -> None:
    """Merge the linears of a decoder layer that read the same tensor, in place.

    Experts' linears are not merged, because each expert reads different tokens.

    Args:
        layer: The decoder layer.
        groups: The family's groups, which say which linears read the same tensor.
    """
    for group in groups:
        members = [layer.get_submodule(name) for name in group.consumers_by_expert().get(None, ())]
        linears = [member for member in members if isinstance(member, Int8Linear)]
        if linears and len(linears) == len(members) and can_merge(linears):
            MergedLinear(linears)


def specify_swiglu(layer: nn.Module, backend: Backend) -> None:
    """Make int8 experts with a SiLU activation use the backend's SwiGLU.

    The backend's SwiGLU is bit-identical on every backend. On a CPU it allows one native call per expert.
    """
    for module in layer.modules():
        if isinstance(module, Int8Experts):
            module.swiglu = is_swiglu(cast(Expert, module[0]).gating, backend)


def make_router_native(layer: nn.Module, moe: Moe, config: Any, backend: Backend) -> None:
    """Replace the router of int8 experts by the native router, if the backend has one that gives the same result."""
    if not isinstance(layer.get_submodule(moe.experts), Int8Experts):
        return
    router = native_router(layer.get_submodule(moe.router), moe.is_normalized(config), backend)
    if router is not None:
        layer.set_submodule(moe.router, router)


def move_to_huge_pages(layers: Iterable[nn.Module]) -> None:
    """Move natively packed weights into one contiguous block of huge pages, in the order in which they are read.

    Weights that were packed into one block (`Backend.weight_block`) stay there. Others move one linear at a time. The
    system allocates a page when it is first written, so at most one linear is in memory twice.
    """
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, Int8Linear)]
    owners = dict.fromkeys(linear.merged or linear for linear in linears if linear.backend.native)
    if len({owner.packed.untyped_storage().data_ptr() for owner in owners}) > 1:
        sizes = [owner.packed.numel() for owner in owners]
        for owner, block in zip(owners, huge_pages(sum(sizes)).split(sizes), strict=True):
            owner.hold(block.view_as(owner.packed).copy_(owner.packed))
