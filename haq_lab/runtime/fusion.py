"""Norms and gated MLPs of a deployed model, each as one kernel with the quantizing that follows.

    fuse(layer, model.groups, backend)

Which norm is read by int8 linears alone, and which linears stand around an activation, follows from the family's
groups. Whether the norm is an RMS or a layer norm, whether the activation is SiLU, is not asked of names but tried: a
part that the kernels do not reproduce stays as it is. They differ from torch in float32's last places, so perplexity
is measured on the layers as they were; this is for running the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.cuda.kernels import K_MULTIPLE, Kernels
from haq_lab.int8.linear import Int8Linear, MergedLinear, QuantizedRows
from haq_lab.models.architectures import Group
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.runtime.equivalence import alike, probe
from haq_lab.runtime.grouped_experts import GroupedExperts, can_group


@torch.no_grad()
def fuse(layer: nn.Module, groups: Iterable[Group], backend: Backend) -> None:
    """Replace what can be fused in a joined decoder layer, in place. Nothing on a backend without such kernels."""
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
    """An RMS norm, or with a bias a layer norm, whose output comes quantised.

    Args:
        norm: The norm that it stands for. Weight and bias are copied under their names: theirs may lie in a mapped
            file, and there at an odd address.
        kernels: What computes it.
        scale: float32 (1,) for the static scheme; None for one scale a token.
    """

    def __init__(self, norm: nn.Module, kernels: Kernels, scale: Tensor | None):
        super().__init__()
        bias: Any = getattr(norm, "bias", None)
        self.weight = _copy(cast(Tensor, norm.weight))
        self.bias = None if bias is None else _copy(bias)
        self.eps: float = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
        self._kernels, self._scale = kernels, scale

    def forward(self, x: Tensor) -> QuantizedRows:
        """x (..., k) floating -> its norm, quantised."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return QuantizedRows(*self.quantized(rows, self._scale), x.shape, x.dtype)

    def quantized(self, rows: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows (m, k) -> int8 (m, k) and float32 scales (m,)."""
        if self.bias is None:
            return self._kernels.rmsnorm_quantize(rows, self.weight, self.eps, scale)
        return self._kernels.layernorm_quantize(rows, self.weight, self.bias, self.eps, scale)

    def reproduces(self, norm: nn.Module, backend: Backend) -> bool:
        """Whether `norm` and then the backend's quantizing give the same, on random rows."""
        x = probe(len(self.weight), backend.device)
        return alike(self.quantized(x, None), backend.quantize(norm(x), "token", None))


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) as two products with one kernel between them.

    Args:
        mlp: The module that it stands for, whose parts it keeps under their names.
        gate_up: The joint product, gate first.
        down: The last linear.
        kernels: What computes the activation.
    """

    def __init__(self, mlp: nn.Module, gate_up: MergedLinear, down: Int8Linear, kernels: Kernels):
        super().__init__()
        for name, part in mlp.named_children():
            self.add_module(name, part)
        self._parts = gate_up, down  # a tuple, or `down` would be registered a second time
        self._kernels, self._scale = kernels, static_scale(down)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """x (..., d) -> (..., d)."""
        down = self._parts[1]
        output: Tensor = down(self.activated(x))
        return output

    def activated(self, x: Tensor | QuantizedRows) -> QuantizedRows:
        """x (..., d) -> what the down projection reads, (..., f)."""
        gate_up, down = self._parts
        both = gate_up.product(x)
        quantized = self._kernels.swiglu_quantize(both.view(-1, both.shape[-1]), self._scale)
        return QuantizedRows(*quantized, torch.Size([*both.shape[:-1], down.in_features]), both.dtype)

    def reproduces(self, mlp: nn.Module, backend: Backend) -> bool:
        """Whether `mlp`, on random rows, gives its down projection the same to read and returns what comes of it."""
        gate_up, down = self._parts
        x, read = probe(gate_up.in_features, backend.device), []
        hook = down.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        output = mlp(x)
        hook.remove()
        if len(read) != 1 or not torch.equal(output, down(read[0])):
            return False
        return alike(self._kernels.swiglu_quantize(gate_up.product(x)), backend.quantize(read[0], "token", None))


def _copy(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.clone(), requires_grad=False)


def static_scale(linear: Int8Linear) -> Tensor | None:
    """The static scale of its input as the kernels take it, float32 (1,); None for one scale a token."""
    return None if linear.input_scale is None else linear.input_scale.float().reshape(1)


def _fuse_norm(layer: nn.Module, group: Group, backend: Backend, kernels: Kernels) -> None:
    """Unless something else reads the norm, or its readers quantise it differently."""
    readers: list[Any] = [layer.get_submodule(name) for name in group.consumers]
    if group.source is None or group.float_consumers or not all(_can_read(reader) for reader in readers):
        return
    norm = layer.get_submodule(group.source)
    if len({reader.input_quantization for reader in readers}) == 1 and norm.weight.dtype == torch.float32:
        fused = QuantizedNorm(norm, kernels, static_scale(readers[0]))
        if fused.reproduces(norm, backend):
            layer.set_submodule(group.source, fused)


def _fuse_mlp(layer: nn.Module, group: Group, backend: Backend, kernels: Kernels) -> None:
    """Where up is joined with a gate before it, and the two and what reads them are a module."""
    assert group.source is not None
    up: Any = layer.get_submodule(group.source)
    down: Any = layer.get_submodule(group.consumers[0])
    place = group.source.rpartition(".")[0]
    gated = isinstance(up, Int8Linear) and up.merged is not None and len(up.merged.members) == 2 and up.place == 1
    if gated and place and len(group.consumers) == 1 and _can_read(down):
        mlp = layer.get_submodule(place)
        fused = GatedMlp(mlp, up.merged, down, kernels)
        if fused.reproduces(mlp, backend):
            layer.set_submodule(place, fused)


def _can_read(linear: nn.Module) -> bool:
    """Whether a linear takes rows that a kernel has quantised."""
    return isinstance(linear, Int8Linear) and linear.scheme != "tensor" and linear.in_features % K_MULTIPLE == 0
