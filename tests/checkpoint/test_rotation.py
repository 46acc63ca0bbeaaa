"""Test that a checkpoint records its rotations, and that what cannot rotate refuses it."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from haq_lab.checkpoint.export.engines import ENGINES, export
from haq_lab.checkpoint.inspect import summarize
from haq_lab.checkpoint.layer_tensors import form_metadata, read_forms
from haq_lab.checkpoint.manifest import FILE, Manifest, layer_file
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import InputForm, Int8Linear
from haq_lab.quantizers.rtn import RTN
from haq_lab.storage.safetensors_file import read_shard, write_shard
from haq_lab.utils.errors import UserError

pytestmark = pytest.mark.parametrize("architecture", ["llama"])


@pytest.fixture
def rotated(write):
    return write(RTN(rotation="block", rotation_block=16))


def test_the_manifest_says_so_in_a_version_of_its_own(rotated):
    content = json.loads((rotated / FILE).read_text())
    assert (content["version"], content["rotated"]) == (2, True)
    assert Manifest.read(rotated).rotated
    model = QuantizedModel(rotated, ReferenceBackend())
    linears = [module for module in model.load_layer(0).modules() if isinstance(module, Int8Linear)]
    assert {linear.rotation for linear in linears} == {16}


def test_a_checkpoint_without_rotations_is_as_older_versions_read_it(write):
    folder = write(RTN())
    content = json.loads((folder / FILE).read_text())
    assert content["version"] == 1
    assert "rotated" not in content
    assert not Manifest.read(folder).rotated


@pytest.mark.parametrize("engine", ENGINES)
def test_no_other_engine_rotates(rotated, tmp_path, engine):
    with pytest.raises(UserError, match=r"with quantizer\.rotation=none"):
        export(rotated, tmp_path / "model.gguf", engine)
    assert not (tmp_path / "model.gguf").exists()


def test_inspect_shows_the_block(rotated):
    config = json.loads((rotated / "config.json").read_text())
    config["quantization_config"] |= {"provenance": {}}
    (rotated / "config.json").write_text(json.dumps(config))
    console = Console(width=200, record=True)
    console.print(summarize(rotated)[0])
    assert "token, rotated by 16" in console.export_text()


def test_the_metadata_of_a_file_survives(rotated):
    forms = {"a": InputForm("static", 8), "b": InputForm("token")}
    assert read_forms(form_metadata(forms), rotated) == forms
    assert "rotations" not in form_metadata({"b": InputForm("token")})
    with pytest.raises(UserError, match="the schemes are not readable"):
        read_forms(form_metadata(forms) | {"rotations": "[1]"}, rotated)


@pytest.mark.parametrize("block", [3, 1024, 0, -16])
def test_an_impossible_block_is_damage(rotated, block):
    manifest = Manifest.read(rotated)
    file = layer_file(0)
    tensors, metadata = read_shard(rotated, manifest.shard(rotated, file))
    forms = {name: InputForm(form.scheme, block) for name, form in read_forms(metadata, rotated / file).items()}
    shard = write_shard(rotated / file, tensors, form_metadata(forms))
    Manifest(manifest.shards | {file: shard}, manifest.files, rotated=True).write(rotated)
    with pytest.raises(UserError, match="does not fit the config"):
        QuantizedModel(rotated, ReferenceBackend()).load_layer(0)
