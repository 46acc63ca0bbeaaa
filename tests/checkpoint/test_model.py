"""A loaded checkpoint equals the model that wrote it bit for bit, and any damage is reported by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from launching import TINY, launch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.checkpoint.inspect import find_problems, summarize
from haq_lab.checkpoint.layer_tensors import read_formats
from haq_lab.checkpoint.manifest import Manifest
from haq_lab.checkpoint.model import QuantizedCheckpoint, QuantizedModel
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear, weight_bytes
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.runtime.deploy import merge_linears
from haq_lab.utils.errors import UserError


def _metrics(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


def test_a_loaded_checkpoint_gives_the_results_of_its_run(written, tmp_path):
    settings = ["model=quantized", f"model.path={written / 'checkpoint'}"]
    outcome = launch(
        *[s for s in TINY if not s.startswith(("model", "quantizer"))], *settings, f"hydra.run.dir={tmp_path}"
    )
    assert outcome.code == 0, outcome.err
    before, after = _metrics(written / "run"), _metrics(tmp_path)
    assert after["perplexity.python_docs"] == before["perplexity.python_docs"]
    assert "perplexity_fp.python_docs" not in after


@pytest.mark.parametrize("architecture", ["opt", "llama", "mixtral"])
@pytest.mark.parametrize("activations", ["token", "static", "auto"])
def test_logits_are_bit_equal(architecture, activations, windows, logits_of, tmp_path):
    model = LayeredModel(TinyModel(architecture).folder())
    layers = []
    writer = CheckpointWriter(tmp_path / "checkpoint", model, {}, {}, force=False)
    sequential_pass(
        PassInputs(model, HAQ(activations=activations), ReferenceBackend(), windows.flip(0), CalibrationPolicy(), {}),
        lambda index, layer: layers.append(layer),
        writer,
    )
    writer.finish()
    writer.close()
    read = QuantizedModel(tmp_path / "checkpoint", ReferenceBackend())
    loaded = [read.load_layer(index) for index in range(read.depth)]
    assert torch.equal(logits_of(read, loaded, windows), logits_of(model, layers, windows))
    linears = [module for layer in loaded for module in layer.modules() if isinstance(module, Int8Linear)]
    assert len(linears) == sum(len(group.consumers) for group in model.groups_of(0)) * model.depth
    assert not (tmp_path / "checkpoint" / "work").exists()


@pytest.mark.parametrize("architecture", ["opt", "llama", "mixtral"])
@pytest.mark.parametrize("make_backend", [CpuBackend, ReferenceBackend])
def test_4_bit_weights_take_half_the_bytes_and_give_the_same_bits(
    architecture, make_backend, windows, logits_of, tmp_path
):
    model, backend, layers = LayeredModel(TinyModel(architecture).folder()), make_backend(), []
    writer = CheckpointWriter(tmp_path / "checkpoint", model, {}, {}, force=False)
    inputs = PassInputs(model, HAQ(weight_bits=4, group=32), backend, windows.flip(0), CalibrationPolicy(), {})
    sequential_pass(inputs, lambda index, layer: layers.append(layer), writer)
    writer.finish()
    writer.close()
    read = QuantizedModel(tmp_path / "checkpoint", backend, contiguous=True)
    loaded = list(read.load_layers())
    assert torch.equal(logits_of(read, loaded, windows), logits_of(model, layers, windows))
    linears = [module for layer in loaded for module in layer.modules() if isinstance(module, Int8Linear)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    packed = sum(linear.packed.numel() for linear in linears)
    stored = sum(shard.bytes for name, shard in read.manifest.shards.items() if name.startswith("layer"))
    padding = sum(-linear.out_features % 32 * linear.in_features // 2 for linear in linears)
    assert weights / 2 <= packed <= weights / 2 + padding
    assert weights / 2 < stored < weights / 2 * 1.6, "two to a byte, float32 scales for 32 weights, norms and headers"
    assert {format for layer in read.weight_formats() for format in layer.values()} == {WeightFormat(4, 32)}
    table, _ = summarize(tmp_path / "checkpoint")
    assert "I4 in groups of 32" in table.columns[1]._cells
    assert not list(find_problems(tmp_path / "checkpoint"))


def test_damaged_weight_formats_are_reported(tmp_path):
    for formats in ('{"a": {"bits": 3, "group": 32}}', '{"a": {"bits": 4, "group": 48}}', "[]"):
        with pytest.raises(UserError, match=r"layer\.safetensors: the formats are not readable"):
            read_formats({"weight_formats": formats}, tmp_path / "layer.safetensors")


@pytest.mark.parametrize("make_backend", [CpuBackend, ReferenceBackend])
def test_layers_read_ahead_equal_those_read_alone(written, make_backend):
    backend = make_backend()
    model = QuantizedModel(written / "checkpoint", backend, contiguous=True)
    ahead, alone = (
        torch.nn.ModuleList(layers)
        for layers in (model.load_layers(), (model.load_layer(index) for index in range(model.depth)))
    )
    for layer in ahead:
        merge_linears(layer, model.groups_of(0))
    assert weight_bytes(ahead) == weight_bytes(alone)
    wanted = alone.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ahead.state_dict().items())
    if backend.native:
        linears = [module for module in ahead.modules() if isinstance(module, Int8Linear)]
        assert len({linear.packed.untyped_storage().data_ptr() for linear in linears}) == 1, "one block"


def test_provenance_and_dtype(written):
    config = json.loads((written / "checkpoint" / "config.json").read_text())
    origin = config["quantization_config"]["provenance"]
    assert origin["settings"]["quantizer"]["activations"] == "static"
    assert len(origin["model"]["files"]["model.safetensors"]) == 64
    assert origin["calibration"]["text_sha256"]
    assert origin["calibration"]["seed"] == 0
    assert {"torch", "transformers", "python"} <= {*origin["versions"]}


def test_other_loaders_refuse_it(written, monkeypatch):
    monkeypatch.delitem(
        AUTO_QUANTIZATION_CONFIG_MAPPING, "haq_lab", raising=False
    )  # as if haq_lab.hf were not imported
    with pytest.raises(ValueError, match=r"dtype=torch\.int8. as it.s not a floating"):
        AutoModelForCausalLM.from_pretrained(written / "checkpoint")
    with pytest.raises(UserError, match="already quantised by haq_lab"):
        LayeredModel(written / "checkpoint")


def test_it_is_not_quantised_again(written, tmp_path):
    settings = ["model=quantized", f"model.path={written / 'checkpoint'}", "quantizer=haq"]
    outcome = launch(*settings, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert "quantizer=none" in outcome.err


def _load_all(folder):
    model = QuantizedModel(QuantizedCheckpoint(str(folder)).folder(), ReferenceBackend())
    return [model.load_layer(index) for index in range(model.depth)]


def _swap(folder):
    one, two = folder / "layer-00000.safetensors", folder / "layer-00001.safetensors"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


DAMAGE = {
    r"layer-00001\.safetensors is missing": lambda folder: (folder / "layer-00001.safetensors").unlink(),
    r"layer-00000\.safetensors: tensor '.*layers\.\d\..*' does not match the manifest": _swap,
    r"rest\.safetensors .* truncated": lambda folder: (folder / "rest.safetensors").write_bytes(b"1234"),
    r"config\.json does not match": lambda folder: (folder / "config.json").write_text("{}"),
    r"tokenizer\.json is missing": lambda folder: (folder / "tokenizer.json").unlink(),
    r"is not a haq_lab checkpoint": lambda folder: (folder / "manifest.json").unlink(),
    r"manifest\.json is not a readable manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    r"there is no folder": lambda folder: shutil.rmtree(folder),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named(checkpoint, message):
    DAMAGE[message](checkpoint)
    with pytest.raises(UserError, match=message):
        _load_all(checkpoint)


def test_a_flipped_bit_names_file_and_tensor(checkpoint):
    path = checkpoint / "layer-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"layer-00001\.safetensors: tensor '.*layers\.1\..*' does not match its hash"):
        _load_all(checkpoint)


@pytest.mark.parametrize("name", ["..", ".", "", "../config.json", "/etc/passwd", "a/b.txt"])
def test_a_manifest_may_only_name_files_inside_the_checkpoint(name, tmp_path):
    content = {"format": "haq_lab", "version": 1, "shards": [], "files": {name: "0" * 64}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"names '{name}', which is outside the checkpoint"):
        Manifest.read(tmp_path)
