"""Fuse norms and gated MLPs with the quantization that follows them, on a GPU.

    fuse(layer, model.groups_of(index), backend)

The family's groups say which norms are read by int8 linears only, and which linears surround an activation. The kind
of norm and activation is not read from class names. Instead each kernel is compared with the module on random rows,
and a module that differs is not replaced.

The kernels differ from torch in the last bits of float32. Perplexity is therefore measured on the original layers,
and fused layers are used to run the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import K_MULTIPLE, aligned
from haq_lab.int8.linear import Int8Linear, MergedLinear, QuantizedRows
from haq_lab.int8.rotation import NO_ROTATION
from haq_lab.models.families.family import Group
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.runtime.equivalence import make_probe, nearly_equal
from haq_lab.runtime.grouped_experts import GroupedExperts, can_group


@torch.no_grad()
def fuse(layer: nn.Module, groups: Iterable[Group], backend: Backend) -> None:
    """Replace the norms, MLPs and experts of a decoder layer by fused ones, in place.

    Nothing changes if the backend has no fused kernels.

    Args:
        layer: A decoder layer whose linears have been merged.
        groups: The family's groups.
        backend: The backend of its int8 linears.
    """
    if backend.fused_kernels is None:
        return
    for group in groups:
        if group.kind == "norm":
            _fuse_norm(layer, group, backend, backend.fused_kernels)
        elif group.kind == "up":
            _fuse_mlp(layer, group, backend, backend.fused_kernels)
    for name, module in list(layer.named_modules()):
        if isinstance(module, Int8Experts) and can_group(module):
            layer.set_submodule(name, GroupedExperts.of(module))


class QuantizedNorm(nn.Module):
    """A norm with quantised output: RMSNorm, or LayerNorm if there is a bias.

    Args:
        norm: The norm to replace. Its weight and bias are copied, because those in a memory-mapped file may not be
            aligned.
        kernels: The fused kernels.
        scale: float32 (1,) for the static scheme; None for one scale per token.
        rotation: Block of the rotation between norm and quantization (`haq_lab.int8.rotation`); 1 for none.
    """

    def __init__(self, norm: nn.Module, kernels: Kernels, scale: Tensor | None, rotation: int = NO_ROTATION):
        super().__init__()
        bias: Any = getattr(norm, "bias", None)
        self.weight = _copy(cast(Tensor, norm.weight))
        self.bias = None if bias is None else _copy(bias)
        self.eps: float = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
        self._kernels, self._scale, self._rotation = kernels, scale, rotation

    def forward(self, x: Tensor) -> QuantizedRows:
        """Normalise and quantise x (..., k)."""
        rows = aligned(x.reshape(-1, x.shape[-1]))
        return QuantizedRows(*self.normalize(rows, self._scale), x.shape, x.dtype)

    def normalize(self, rows: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalise, rotate and quantise rows (m, k). Returns int8 (m, k) and float32 scales (m,)."""
        if self.bias is None:
            return self._kernels.rmsnorm_quantize(rows, self.weight, self.eps, scale, self._rotation)
        return self._kernels.layernorm_quantize(rows, self.weight, self.bias, self.eps, scale, self._rotation)

    def reproduces(self, norm: nn.Module, backend: Backend) -> bool:
        """Return whether `norm` followed by the backend's quantization gives the same result on random rows."""
        x = make_probe(len(self.weight), backend.device)
        wanted = backend.quantize(norm(x), "token", None, rotation=self._rotation)
        return nearly_equal(self.normalize(x, None), wanted)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) as two products with one fused activation kernel between them.

    Args:
        mlp: The module to replace. Its submodules keep their names.
        gate_up: The merged gate and up projections, gate first.
        down: The down projection.
        kernels: The fused kernels.
    """

    def __init__(self, mlp: nn.Module, gate_up: MergedLinear, down: Int8Linear, kernels: Kernels):
        super().__init__()
        for name, part in mlp.named_children():
            self.add_module(name, part)
        self._parts = gate_up, down  # in a tuple, so that `down` is not registered twice
        self._kernels, self._scale, self._rotation = kernels, static_scale(down), down.rotation

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Compute the MLP for x (..., d). Returns (..., d)."""
        down = self._parts[1]
        output: Tensor = down(self.activate(x))
        return output

    def activate(self, x: Tensor | QuantizedRows) -> QuantizedRows:
        """Compute the quantised input (..., f) of the down projection for x (..., d)."""
        gate_up, down = self._parts
        product = gate_up.product(x)
        quantized = self._kernels.swiglu_quantize(product.view(-1, product.shape[-1]), self._scale, self._rotation)
        return QuantizedRows(*quantized, torch.Size([*product.shape[:-1], down.in_features]), product.dtype)

    def reproduces(self, mlp: nn.Module, backend: Backend) -> bool:
        """Return whether the kernel gives the same result as `mlp` on random rows.

        `mlp` must return its down projection's output unchanged, and that projection's input must be the kernel's.
        """
        gate_up, down = self._parts
        x, down_inputs = make_probe(gate_up.in_features, backend.device), []
        hook = down.register_forward_pre_hook(lambda _, inputs: down_inputs.append(inputs[0]))
        output = mlp(x)
        hook.remove()
        if len(down_inputs) != 1 or not torch.equal(output, down(down_inputs[0])):
            return False
        wanted = backend.quantize(down_inputs[0], "token", None, rotation=self._rotation)
        return nearly_equal(self._kernels.swiglu_quantize(gate_up.product(x), None, self._rotation), wanted)


def _copy(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.clone(), requires_grad=False)


def static_scale(linear: Int8Linear) -> Tensor | None:
    """Return the static scale of a linear's input, float32 (1,), or None if each token has its own scale."""
    return None if linear.input_scale is None else aligned(linear.input_scale.float().reshape(1))


def _fuse_norm(layer: nn.Module, group: Group, backend: Backend, kernels: Kernels) -> None:
    """Fuse a norm if only int8 linears read it and all quantise it in the same way."""
    readers: list[Any] = [layer.get_submodule(name) for name in group.consumers]
    if group.source is None or group.float_consumers or not all(_can_read(reader) for reader in readers):
        return
    norm = layer.get_submodule(group.source)
    if len({reader.input_quantization for reader in readers}) == 1 and norm.weight.dtype == torch.float32:
        fused = QuantizedNorm(norm, kernels, static_scale(readers[0]), readers[0].rotation)
        if fused.reproduces(norm, backend):
            layer.set_submodule(group.source, fused)


def _fuse_mlp(layer: nn.Module, group: Group, backend: Backend, kernels: Kernels) -> None:
    """Fuse an MLP if gate and up are merged in this order and one module contains them and the down projection."""
    if group.source is None:
        return
    up: Any = layer.get_submodule(group.source)
    down: Any = layer.get_submodule(group.consumers[0])
    name = group.source.rpartition(".")[0]
    gated = isinstance(up, Int8Linear) and up.merged is not None and len(up.merged.members) == 2 and up.place == 1
    if gated and name and len(group.consumers) == 1 and _can_read(down):
        mlp = layer.get_submodule(name)
        fused = GatedMlp(mlp, up.merged, down, kernels)
        if fused.reproduces(mlp, backend):
            layer.set_submodule(name, fused)


def _can_read(linear: nn.Module) -> bool:
    """Return whether a linear can read `QuantizedRows`."""
    return (
        isinstance(linear, Int8Linear)
        and linear.scheme != "tensor"
        and linear.in_features % K_MULTIPLE == 0
        and linear.backend.fused_kernels.can_rotate(linear.in_features, linear.rotation)
    )
