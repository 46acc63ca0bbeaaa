"""transformers loads the export without missing or unexpected tensors, and the weights are bit-identical."""

from __future__ import annotations

import json
import sys
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from haq_lab.checkpoint.export.compressed_tensors import pack
from haq_lab.checkpoint.export.engines import export
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.cli import checkpoint as command
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.utils.errors import UserError
from tests.models.test_generic import save_model

compressed_tensors = pytest.importorskip("compressed_tensors")


def _read(folder, windows):
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return model(windows).logits


def _apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activations", ["token", "static"])
def test_transformers_reads_it(write, dequantized, windows, logits_of, tmp_path, activations):
    folder = write(HAQ(activations=activations, rotation="none"))
    export(folder, tmp_path / "export")
    model = QuantizedModel(folder, ReferenceBackend())
    layers = [[model.load_layer(index) for index in range(model.depth)] for _ in range(2)]
    ours = logits_of(model, layers[0], windows)
    weights_only = logits_of(model, [dequantized(model, layer) for layer in layers[1]], windows)
    theirs = _read(tmp_path / "export", windows)
    if model.family.moe:
        assert _apart(theirs, weights_only) < 1e-5
    elif activations == "static":
        assert _apart(theirs, ours) < 0.01 < _apart(weights_only, ours)
    else:  # another scale for a row, see the module
        assert _apart(theirs, ours) < 2 * _apart(weights_only, ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["dots1"])
def test_a_mixture_of_a_generic_family_has_our_weights(write, dequantized, windows, logits_of, tmp_path, architecture):
    """Its logits differ from the checkpoint's, because an exported Mixture does not quantise activations."""
    folder = write(RTN(), LayeredModel(save_model(tmp_path / "model", architecture), family="generic"))
    export(folder, tmp_path / "export")
    model = QuantizedModel(folder, ReferenceBackend())
    weights_only = [dequantized(model, model.load_layer(index)) for index in range(model.depth)]
    assert _apart(_read(tmp_path / "export", windows), logits_of(model, weights_only, windows)) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["llama"])
def test_linears_may_have_different_schemes(write, windows, tmp_path):
    # Linears of this random model lie on both sides of the limit.
    folder = write(HAQ(activations="auto", auto_limit=0.15, rotation="none"))
    export(folder, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    assert {*config["config_groups"]} == {"static", "token"}
    _read(tmp_path / "export", windows)


def test_packing_equals_compressed_tensors():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    levels = torch.randint(-127, 128, (6, 32)).to(torch.int8)
    assert torch.equal(pack(levels), pack_to_int32(levels, 8))


@pytest.mark.parametrize("architecture", ["llama"])
def test_the_command(write, tmp_path, capsys):
    folder = write(HAQ(rotation="none"))

    def run(*arguments):
        with mock.patch.object(sys, "argv", ["checkpoint", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
            command.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    code, text = run("inspect", folder)
    assert code == 0
    assert "model.layers.*.mlp.gate_proj.weight" in text
    code, text = run("verify", folder)
    assert (code, "match their hashes" in text) == (0, True)
    assert run("export", folder, tmp_path / "export")[0] == 0
    code, text = run("export", folder, tmp_path / "export")
    assert (code, "already exists" in text) == (2, True)
    with (folder / "layer-00000.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    (folder / "stray.txt").write_text("")
    code, text = run("verify", folder)
    assert code == 2
    assert "layer-00000.safetensors: tensor" in text
    assert "stray.txt does not belong" in text
    with pytest.raises(UserError, match="does not match its hash"):
        export(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()
