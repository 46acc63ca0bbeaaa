"""The table of supported architectures, from the family table and a tiny random model of each architecture.

Each model is quantised to a checkpoint, and this machine tries what the table says: native layers on the CPU, fused
kernels (computed by torch here), and the exports.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import haq_lab
from docs.tools.tables import code, table
from haq_lab.checkpoint.export.compressed_tensors import export_for_transformers, export_for_vllm
from haq_lab.checkpoint.export.gguf_metadata import architecture_of
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.backend import Backend, ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.families.family import Family
from haq_lab.models.families.float_share import FloatShare
from haq_lab.models.families.layer_kinds import LayerKinds
from haq_lab.models.families.lookup import FAMILIES, family_of
from haq_lab.models.families.tiny import tiny_fields
from haq_lab.models.sources import TinyModel
from haq_lab.runtime.deploy import deploy
from haq_lab.runtime.fusion import GatedMlp, QuantizedNorm
from haq_lab.runtime.grouped_experts import GroupedExperts
from haq_lab.runtime.native_decoder import MoeStack, NativeStack
from haq_lab.utils.errors import UserError
from haq_lab.utils.hugging_face import quiet_transformers

FUSED = {"norms": QuantizedNorm, "MLP": GatedMlp, "experts": GroupedExperts}
HEAD = (
    *("`model_type`", "quantised linears", "share", "smoothing folds into"),
    *("native on a CPU", "fused on CUDA", "offloads", "exports to"),
)


class TorchKernels:
    """What the fused CUDA kernels compute, to find the modules that they replace."""

    def __init__(self, backend: Backend):
        self._backend = backend

    def can_rotate(self, k: int, rotation: int) -> bool:
        """The kernels rotate every width of the tiny models."""
        return True

    def rmsnorm_quantize(self, x: Tensor, weight: Tensor, eps: float, *how: Any) -> tuple[Tensor, Tensor]:
        """Quantise RMSNorm(x)."""
        return self._quantize(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight, *how)

    def layernorm_quantize(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *how: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantise LayerNorm(x)."""
        return self._quantize(F.layer_norm(x, x.shape[-1:], weight, bias, eps), *how)

    def swiglu_quantize(self, x: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        """Quantise silu(gate) * up."""
        gate, up = x.chunk(2, dim=-1)
        return self._quantize(F.silu(gate) * up, *how)

    def _quantize(self, x: Tensor, scale: Tensor | None, rotation: int = 1) -> tuple[Tensor, Tensor]:
        return self._backend.quantize(x, "static" if scale is not None else "token", scale, rotation=rotation)


class FusingBackend(ReferenceBackend):
    """The reference backend with fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.fused_kernels = TorchKernels(self)


def families() -> str:
    """Return the table, one row a model type."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), quiet_transformers():
        rows = [_row(kind, Path(folder) / kind) for kind in dict.fromkeys(family.model_type for family in FAMILIES)]
    return table(HEAD, rows)


def _row(kind: str, folder: Path) -> tuple[str, ...]:
    checkpoint = haq_lab.quantize(TinyModel(kind).folder(), "rtn", out=folder / "checkpoint")
    model = QuantizedModel(checkpoint, CpuBackend())
    modules = [pair for layer in model.load_layers() for pair in layer.named_modules()]
    linears = [name for name, module in modules if isinstance(module, Int8Linear)]
    return (
        code(kind),
        ", ".join(dict.fromkeys(name.rpartition(".")[2].removesuffix("_proj") for name in linears)),
        f"{_share(kind):.1%}",
        _folds(model.family),
        _native(model),
        _fused(QuantizedModel(checkpoint, FusingBackend())),
        "yes" if model.family.moe else "",
        ", ".join(_exports(model, folder)),
    )


def _share(kind: str) -> float:
    """Return the share of quantised weights in a model of transformers' default size for this architecture."""
    config = AutoConfig.for_model(kind)
    row = next(family for family in FAMILIES if family.model_type == kind)
    for field, values in row.unsupported(config):
        setattr(config, field, values[0])
    if getattr(config, "layer_types", ()) is None:  # the default config builds no model without them
        config.layer_types = tiny_fields(kind, config.num_hidden_layers, 64)["layer_types"]
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    floats = FloatShare.of(LayerKinds(family_of(config), config), config.num_hidden_layers)
    return floats.parameters * (1 - floats.share) / sum(parameter.numel() for parameter in whole.parameters())


def _folds(family: Family) -> str:
    """Return the kinds of modules that take a smoothing factor, and the inputs that none takes."""
    kinds = dict.fromkeys(group.kind for group in family.groups if group.source is not None)
    without = [group.consumers[0].rpartition(".")[2] for group in family.groups if group.source is None]
    names = {"norm": "norms", "value": "value", "up": "up"}
    text = ", ".join(names[kind] for kind in kinds) or "nothing"
    return text + (f"; not into the input of {', '.join(without)}" if without and kinds else "")


def _layers(model: QuantizedModel) -> nn.Module:
    """Return the layers of a model that is ready to run."""
    return deploy(model.assemble([*model.load_layers()]), model, model.backend).get_submodule(model.family.layers)


def _native(model: QuantizedModel) -> str:
    stacks = list(_layers(model).children())
    if not all(isinstance(stack, NativeStack) for stack in stacks):
        return "linears"
    return "attention and linears" if any(isinstance(stack, MoeStack) for stack in stacks) else "whole layers"


def _fused(model: QuantizedModel) -> str:
    found = {type(module) for module in _layers(model).modules()}
    return ", ".join(name for name, kind in FUSED.items() if kind in found)


def _exports(model: QuantizedModel, folder: Path) -> list[str]:
    """Return the engines that an export exists for."""
    possible = []
    for name, export in (("transformers", export_for_transformers), ("vLLM", export_for_vllm)):
        with contextlib.suppress(UserError):
            export(model, folder / name)
            possible.append(name)
    with contextlib.suppress(UserError):
        architecture_of(model)
        possible.append("llama.cpp")
    return possible
