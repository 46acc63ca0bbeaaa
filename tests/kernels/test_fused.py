"""What a deployed model computes with fused kernels is what its layers computed, and what they cannot do stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.linear import Int8Linear, MergedLinear, QuantizedRows, parameter_count, weight_bytes
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN
from haq_lab.runtime.deploy import merge_linears, specify_swiglu
from haq_lab.runtime.fusion import GatedMlp, QuantizedNorm, fuse
from haq_lab.runtime.grouped_experts import GroupedExperts

from . import reference
from .host import HostRunner
from .reference import assert_same_bits

# The versions for sm_75 and sm_80 differ in the products alone, whose bits are tested for both.
pytestmark = pytest.mark.parametrize("host_runner", [80], indirect=True, ids=["sm_80"])

# By architecture: what is fused, and the kernels of one layer's forward.
MOE: dict[str, type[nn.Module]] = {"input_layernorm": QuantizedNorm, "mlp.experts": GroupedExperts}
FUSED: dict[str, dict[str, type[nn.Module]]] = {
    "llama": {"input_layernorm": QuantizedNorm, "post_attention_layernorm": QuantizedNorm, "mlp": GatedMlp},
    "opt": {"self_attn_layer_norm": QuantizedNorm, "final_layer_norm": QuantizedNorm},
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "olmoe": MOE,
}
ATTENTION = ["rmsnorm_quantize", "gemm", "quantize", "gemm"]
GROUPED = [*ATTENTION, "quantize", "grouped", "swiglu_quantize", "grouped"]
LAUNCHES = {
    "llama": [*ATTENTION, "rmsnorm_quantize", "gemm", "swiglu_quantize", "gemm"],
    "opt": ["layernorm_quantize", "gemm", "quantize", "gemm"] * 2,
} | dict.fromkeys(["mixtral", "qwen3_moe", "olmoe"], GROUPED)


def quantized_layer(architecture: str, backend: CudaBackend, scheme: str = "token") -> tuple[LayeredModel, nn.Module]:
    """A tiny model's first layer, its linears not joined yet."""
    model = LayeredModel(TinyModel(architecture, layers=1).folder())  # type: ignore[arg-type]
    calibration = torch.randint(0, 257, (2, 16)) if scheme == "static" else None
    layers: list[nn.Module] = []
    quantizer = RTN(activations=scheme)  # type: ignore[arg-type]
    sequential_pass(
        PassInputs(model, quantizer, backend, calibration, CalibrationPolicy(), {}),
        lambda index, layer: layers.append(layer),
    )
    return model, layers[0]


def joined_and_fused(model: LayeredModel, layer: nn.Module, backend: CudaBackend) -> dict[str, type[nn.Module]]:
    """What has been fused, by its place."""
    merge_linears(layer, model.groups_of(0))
    specify_swiglu(layer, backend)
    fuse(layer, model.groups_of(0), backend)
    kinds = (QuantizedNorm, GatedMlp, GroupedExperts)
    return {name: type(module) for name, module in layer.named_modules() if isinstance(module, kinds)}


def forward(model: LayeredModel, layer: nn.Module, hidden: Tensor) -> Tensor:
    """The layer over hidden states, where its parameters are."""
    device = next(layer.parameters()).device
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), model._arguments_for(hidden.shape[1])[0])
    return layer(hidden.to(device), **arguments).to(hidden.device)


def agree(got: Tensor, wanted: Tensor, hidden: Tensor) -> None:
    """Most tokens to float32's last places; the others by the fall of a value to another level."""
    error = (got - wanted).norm(dim=-1) / (wanted - hidden).norm(dim=-1)
    assert error.median() < 1e-5
    assert error.max() < 0.05


@pytest.mark.parametrize("scheme", ["token", "static"])
@pytest.mark.parametrize("architecture", FUSED)
def test_a_layer_computes_what_it_computed(host: Kernels, host_runner: HostRunner, architecture: str, scheme: str):
    backend = CudaBackend("cpu", host)
    model, layer = quantized_layer(architecture, backend, scheme)
    hidden = model.embed(torch.randint(0, 257, (2, 20)))
    wanted = forward(model, layer, hidden)
    names, size, count = sorted(layer.state_dict()), weight_bytes(layer), parameter_count(layer)
    assert joined_and_fused(model, layer, backend) == FUSED[architecture]
    host_runner.launches.clear()
    agree(forward(model, layer, hidden), wanted, hidden)
    launched = [launch.kernel.split("_f32")[0] for launch in host_runner.launches]
    launched = [name.split("_")[0] if name.startswith(("gemm_", "grouped_")) else name for name in launched]
    expected = list(LAUNCHES[architecture])
    if model.family.moe is not None and scheme == "static":
        expected.remove("swiglu_quantize")  # each expert's down projection has a scale of its own
    assert [name for name in launched if name != "finish"] == expected
    assert sorted(layer.state_dict()) == names
    assert parameter_count(layer) == count
    assert weight_bytes(layer) == size, "nothing is held twice"


@pytest.mark.parametrize("static", [False, True])
def test_norms_have_the_references_bits(host: Kernels, static: bool):
    x, scale = torch.randn(2, 5, 48), torch.tensor([0.02]) if static else None
    norms = LlamaRMSNorm(48, eps=1e-6), nn.LayerNorm(48, eps=1e-3)
    for norm in norms:
        for parameter in norm.parameters():
            parameter.normal_()
        rows = QuantizedNorm(norm, host, scale)(x.bfloat16())
        values, weight = x.bfloat16().float().view(10, 48).numpy(), norm.weight.numpy()
        if norm is norms[0]:
            normed = reference.rmsnorm(values, weight, 1e-6)
        else:
            normed = reference.layernorm(values, weight, norm.bias.numpy(), 1e-3)
        levels, scales = reference.quantize(normed, 0.02 if static else None)
        assert_same_bits(rows.levels, levels)
        assert_same_bits(rows.scale, scales)
        assert (rows.shape, rows.dtype) == (x.shape, torch.bfloat16)


class Centred(LlamaRMSNorm):
    """As Gemma's: the weight is what is added to one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x / self.weight.numel()


class Scaled(nn.Module):
    """A MLP whose result is scaled."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.mlp(x)


def another_norm(layer: nn.Module) -> None:
    layer.input_layernorm.__class__ = Centred


def another_epsilon(layer: nn.Module) -> None:
    """The norm's own code has a constant in place of its attribute."""
    norm = LlamaRMSNorm(64)
    norm.weight.data.copy_(layer.input_layernorm.weight)
    layer.input_layernorm.forward = norm.forward
    layer.input_layernorm.variance_epsilon = 1.1e-6


def a_layer_norm_without_bias(layer: nn.Module) -> None:
    layer.input_layernorm = nn.LayerNorm(64, bias=False)


def a_half_precision_norm(layer: nn.Module) -> None:
    layer.input_layernorm.bfloat16()


def one_scale_for_all_rows(layer: nn.Module) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        layer.self_attn.get_submodule(name).scheme = "tensor"


def one_reader_that_quantises_differently(layer: nn.Module) -> None:
    layer.self_attn.k_proj.scheme, layer.self_attn.k_proj.input_scale = "static", torch.tensor(0.1)


def one_reader_in_float(layer: nn.Module) -> None:
    layer.self_attn.k_proj = nn.Linear(64, 32)


def another_activation(layer: nn.Module) -> None:
    layer.mlp.act_fn = nn.GELU()


def up_before_gate(layer: nn.Module) -> None:
    MergedLinear([layer.mlp.up_proj, layer.mlp.gate_proj])


def a_scaled_mlp(layer: nn.Module) -> None:
    layer.mlp = Scaled(layer.mlp)


def one_scale_for_all_inner_rows(layer: nn.Module) -> None:
    layer.mlp.down_proj.scheme = "tensor"


ATTENTION_NORM, MLP = "input_layernorm", "mlp"


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (another_norm, ATTENTION_NORM),
        (another_epsilon, ATTENTION_NORM),
        (a_layer_norm_without_bias, ATTENTION_NORM),
        (a_half_precision_norm, ATTENTION_NORM),
        (one_scale_for_all_rows, ATTENTION_NORM),
        (one_reader_that_quantises_differently, ATTENTION_NORM),
        (one_reader_in_float, ATTENTION_NORM),
        (another_activation, MLP),
        (up_before_gate, MLP),
        (a_scaled_mlp, MLP),
        (one_scale_for_all_inner_rows, MLP),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_the_kernels_do_not_do_stays(host: Kernels, change: Callable[[nn.Module], None], left: str):
    backend = CudaBackend("cpu", host)
    model, layer = quantized_layer("llama", backend)
    change(layer)
    hidden = model.embed(torch.randint(0, 257, (1, 12)))
    wanted = forward(model, layer, hidden)
    assert left not in joined_and_fused(model, layer, backend)
    agree(forward(model, layer, hidden), wanted, hidden)


def test_widths_that_are_no_multiple_of_16_stay(host: Kernels):
    """K is padded for a product, but a norm divides by it, and an activation's halves would not be two rows."""
    backend = CudaBackend("cpu", host)
    model, layer = quantized_layer("llama", backend)
    for name, rows, columns in (("gate_proj", 40, 64), ("up_proj", 40, 64), ("down_proj", 64, 40)):
        layer.mlp.set_submodule(name, Int8Linear.rounded(nn.Linear(columns, rows, bias=False), backend))
    for name in ("q_proj", "k_proj", "v_proj"):
        layer.self_attn.set_submodule(name, Int8Linear.rounded(nn.Linear(40, 32, bias=False), backend))
    layer.input_layernorm = LlamaRMSNorm(40)
    assert joined_and_fused(model, layer, backend) == {"post_attention_layernorm": QuantizedNorm}


def test_a_backend_without_such_kernels_fuses_nothing(host: Kernels):
    backend = CudaBackend("cpu", host)
    backend.fused_kernels = None
    model, layer = quantized_layer("llama", backend)
    assert joined_and_fused(model, layer, backend) == {}


def test_another_reader_of_a_fused_norm_is_refused(host: Kernels):
    model, layer = quantized_layer("llama", CudaBackend("cpu", host))
    joined_and_fused(model, layer, CudaBackend("cpu", host))
    rows = layer.input_layernorm(torch.randn(1, 4, 64))
    assert isinstance(rows, QuantizedRows)
    with pytest.raises(TypeError):
        nn.Linear(64, 4)(rows)
