"""The export for vLLM has the tensors that vLLM 0.32 loads, and compressed-tensors' own reader returns our weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from haq_lab.checkpoint.export.engines import export
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.utils.errors import UserError

pytest.importorskip("compressed_tensors")

# Names of an expert's gate, up and down projections in vllm/model_executor/models: `ckpt_gate_proj_name` and so on in
# mixtral.py, qwen3_moe.py and olmoe.py.
EXPERTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def _read(folder):
    """Return the tensors, and the quantization config as compressed-tensors reads it."""
    from compressed_tensors.quantization import QuantizationConfig

    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return tensors, QuantizationConfig.model_validate(config)


def _decompressed(tensors, module, config):
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor

    (scheme,) = config.config_groups.values()
    parts = {part: tensors[f"{module}.{part}"] for part in ("weight", "weight_scale")}
    return IntQuantizationCompressor.decompress(parts, scheme)["weight"]


@pytest.mark.parametrize("architecture", [*EXPERTS])
def test_experts_have_int8_weights_and_dynamic_token_scales(write, dequantized, architecture, tmp_path):
    folder = write(HAQ(rotation="none"))
    export(folder, tmp_path / "export", "vllm")
    tensors, config = _read(tmp_path / "export")
    assert config.format == "int-quantized"
    (group,) = config.config_groups.values()
    assert group.targets == ["Linear"]  # vLLM applies the group of "Linear" to fused experts too
    for args, expected in ((group.weights, ("channel", False)), (group.input_activations, ("token", True))):
        assert (args.num_bits, args.type, args.symmetric, args.strategy, args.dynamic) == (8, "int", True, *expected)
    model = QuantizedModel(folder, ReferenceBackend())
    layer = dequantized(model, model.load_layer(1))
    block, projections = EXPERTS[architecture]
    for number in (0, model.experts - 1):
        expert = layer.get_submodule(f"mlp.experts.{number}")
        ours = (expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight)
        for name, weight in zip(projections, ours, strict=True):
            module = f"model.layers.1.{block}.experts.{number}.{name}"
            assert tensors[f"{module}.weight"].dtype == torch.int8
            assert tensors[f"{module}.weight_scale"].shape == (len(weight), 1)
            assert torch.equal(_decompressed(tensors, module, config), weight)
    router = tensors[f"model.layers.1.{block}.gate.weight"]
    assert torch.equal(router, layer.get_submodule("mlp.gate").weight)
    assert not any("input_scale" in name or "packed" in name for name in tensors)


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_dense_model_is_exported_as_for_transformers(write, tmp_path):
    folder = write(RTN(activations="static"))
    export(folder, tmp_path / "vllm", "vllm")
    export(folder, tmp_path / "transformers")
    exports = [tmp_path / "vllm", tmp_path / "transformers"]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in exports)
    assert first == second


@pytest.mark.parametrize(
    ("architecture", "activations", "needed"),
    [("mixtral", "static", "token"), ("mixtral", "tensor", "token"), ("llama", "tensor", "token or static")],
)
def test_schemes_without_a_kernel_are_refused(write, activations, needed, tmp_path):
    folder = write(RTN(activations=activations))
    message = (
        rf"export: 'model\.layers\.0\.[a-z0-9_.]+' has {activations} activation scales, but vLLM's int8 kernels for "
        rf"(dense|MoE) models need {needed} scales\. Quantise the model with quantizer\.activations=token\."
    )
    with pytest.raises(UserError, match=message):
        export(folder, tmp_path / "export", "vllm")
    assert [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_4_bit_weights_are_packed_in_groups(write, dequantized, architecture, engine, tmp_path):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    folder = write(RTN(weight_bits=4, group=32))
    export(folder, tmp_path / "export", engine)
    tensors, config = _read(tmp_path / "export")
    (group,) = config.config_groups.values()
    assert config.format == "pack-quantized"
    assert (group.weights.num_bits, group.weights.strategy, group.weights.group_size) == (4, "group", 32)
    assert group.input_activations is None, "packed weights are multiplied by 16-bit activations"
    model = QuantizedModel(folder, ReferenceBackend())
    weight = dequantized(model, model.load_layer(1)).state_dict()["self_attn.v_proj.weight"]
    parts = {
        part: tensors[f"model.layers.1.self_attn.v_proj.{part}"]
        for part in ("weight_packed", "weight_scale", "weight_shape")
    }
    assert torch.equal(PackedQuantizationCompressor.decompress(parts, group)["weight"], weight)


@pytest.mark.parametrize("architecture", ["llama"])
def test_bits_by_linear_are_groups_of_linears(write, architecture, tmp_path):
    folder = write(HAQ(rotation="none", weight_bits="auto", bits=6, group=32))
    export(folder, tmp_path / "export", "vllm")
    _, config = _read(tmp_path / "export")
    formats = QuantizedModel(folder, ReferenceBackend()).weight_formats()
    for bits in (4, 8):
        names = {
            f"model.layers.{index}.{name}"
            for index, layer in enumerate(formats)
            for name, format in layer.items()
            if format.bits == bits
        }
        assert names == set(config.config_groups[f"{bits}_bits"].targets)
        assert config.config_groups[f"{bits}_bits"].weights.num_bits == bits


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_group_that_does_not_divide_the_width_is_refused(write, architecture, tmp_path):
    folder = write(RTN(weight_bits=4, group=128))
    message = r"has 64 inputs, which are not a multiple of its group of 128.*quantizer.group=64"
    with pytest.raises(UserError, match=message):
        export(folder, tmp_path / "export", "vllm")


@pytest.mark.parametrize("architecture", ["mixtral"])
def test_experts_with_different_bits_are_refused(write, architecture, tmp_path):
    folder = write(HAQ(rotation="none", weight_bits="auto", bits=6, group=32))
    with pytest.raises(UserError, match=r"the experts of layer 0 .* have different numbers of bits"):
        export(folder, tmp_path / "export", "vllm")
