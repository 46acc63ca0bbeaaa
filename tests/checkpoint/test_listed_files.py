"""A checkpoint consists of its listed files. They include the chat template and the generation config."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.checkpoint.accept import accept
from haq_lab.checkpoint.export.compressed_tensors import pack
from haq_lab.checkpoint.export.engines import export
from haq_lab.checkpoint.manifest import Manifest
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN
from haq_lab.utils.errors import UserError

END_TOKENS = {"bos_token_id": 0, "eos_token_id": [0, 5], "temperature": 0.6}  # which `save_pretrained` would refuse
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def _write(source: Path, folder: Path) -> Path:
    model = LayeredModel(source)
    writer = CheckpointWriter(folder, model, {}, {}, force=False)
    windows = torch.zeros(1, 8, dtype=torch.long)
    inputs = PassInputs(model, RTN(), ReferenceBackend(), windows, CalibrationPolicy(), {})
    sequential_pass(inputs, lambda *_: None, writer)
    (folder / "added_tokens.json").write_text('{"planted": 5}')  # while the run is not finished
    writer.finish()
    writer.close()
    return folder


@pytest.fixture(scope="module", params=["file", "tokenizer_config"])
def written(request, tmp_path_factory) -> Path:
    """Return the checkpoint of a chat model with two end tokens. A file was planted while it was written."""
    folder = tmp_path_factory.mktemp("chat")
    source = Path(shutil.copytree(TinyModel("llama", layers=1, hidden=32).folder(), folder / "model"))
    (source / "generation_config.json").write_text(json.dumps(END_TOKENS))
    if request.param == "file":
        (source / "chat_template.jinja").write_text(TEMPLATE)
    else:
        settings = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return _write(source, folder / "checkpoint")


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    folder = Path(shutil.copytree(written, tmp_path / "checkpoint"))
    (folder / "added_tokens.json").unlink()
    return folder


def test_files_of_others_are_not_listed_by_the_writer(written):
    with pytest.raises(UserError, match=r"added_tokens\.json is not listed in manifest\.json, but a loader would read"):
        QuantizedModel(written, ReferenceBackend())


def test_end_tokens_and_chat_template_reach_checkpoint_and_export(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "export")
    for folder in (checkpoint, tmp_path / "export"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 5]
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


PLANTED = [
    "added_tokens.json",
    "special_tokens_map.json",
    "model.safetensors",
    "additional_chat_templates/tools.jinja",
]


@pytest.mark.parametrize("name", PLANTED)
def test_an_added_file_is_refused_until_it_is_accepted(checkpoint, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("{}")
    with pytest.raises(UserError, match=rf"{name} is not listed.*python -m haq_lab.checkpoint accept {checkpoint}"):
        QuantizedModel(checkpoint, ReferenceBackend())
    assert name in accept(checkpoint)
    assert name in Manifest.read(checkpoint).files


def test_a_checkpoint_without_a_manifest_is_refused_until_it_is_accepted(checkpoint):
    before = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json.*python -m haq_lab\.checkpoint accept"):
        Manifest.read(checkpoint)
    accept(checkpoint)
    assert json.loads((checkpoint / "manifest.json").read_text()) == json.loads(before)


def test_a_checkpoint_without_a_layer_is_not_accepted(checkpoint):
    (checkpoint / "layer-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"has the layers none, but config\.json has num_hidden_layers=1"):
        accept(checkpoint)


@pytest.mark.parametrize("width", [1, 6, 50, 63])
def test_packing_pads_the_last_word(width):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    levels = torch.randint(-127, 128, (3, width)).to(torch.int8)
    assert torch.equal(pack(levels), helpers.pack_to_int32(levels, 8))


JSON = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))


@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.just(b"[" * 100_000),
        st.just(b'{"format": "haq_lab", "version": 1, "files": {}, "shards": ' + b"[" * 100_000),
        st.builds(
            lambda a, b: json.dumps({"format": "haq_lab", "version": 1, "files": a, "shards": b}).encode(), JSON, JSON
        ),
    )
)
def test_any_manifest_is_read_or_refused(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "manifest.json").write_bytes(content)
    with contextlib.suppress(UserError):
        assert Manifest.read(folder).files == json.loads(content)["files"]
