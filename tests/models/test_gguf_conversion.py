"""GGUF files give the model that they were made from. What transformers reads not or only in part is refused."""

from __future__ import annotations

import json
import re
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import GGUF_CONFIG_MAPPING

from haq_lab.models.families.tiny import tiny_fields
from haq_lab.models.gguf_conversion import FIELDS, convert_gguf
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import GgufModel, TinyModel
from haq_lab.utils.errors import UserError

READ = {  # with the fields in which transformers' defaults differ from the usual tiny config
    "llama": {},
    "qwen2": {},
    "stablelm": {},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {},
    "qwen3": {},
    "phi3": {},
    "starcoder2": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 2},
}
UNREAD = ["deepseek_v2", "deepseek_v3", "glm4", "glm4_moe", "granite", "mixtral", "olmo2", "olmoe", "opt", "smollm3"]


def _architecture(model_type):
    """The architecture's number in the gguf package, and its name in transformers' table."""
    table = model_type.removesuffix("_text")
    spelled = {name.replace("-", ""): number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return spelled[table.replace("_", "")], table


def _write(folder, path, left_out=None, add=lambda writer: None):
    """Write a checkpoint as llama.cpp's convert_hf_to_gguf.py does, in float32. A tensor can be left out or added."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    number, table = _architecture(config.model_type)
    name = gguf.MODEL_ARCH_NAMES[number]
    writer = gguf.GGUFWriter(path, name)
    rope = config.rope_parameters
    theta = rope.get("full_attention", rope)["rope_theta"]
    for key, field in (GGUF_CONFIG_MAPPING[table] | {key: field for field, key in FIELDS.items()}).items():
        value = theta if field == "rope_theta" else getattr(config, field or "", None)
        if value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{name}.{key}", value)
    _add_tokenizer(writer, folder)
    add(writer)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys}
    for key, tensor in tensors.items():
        for stored, data in _stored(table, names, key, tensor.numpy(), config):
            assert not stored.startswith("None"), f"the gguf package has no name for {key}"
            if stored != left_out:
                writer.add_tensor(stored, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(table, names, key, data, config):
    """The tensors of a file that hold one of a model, with their names."""
    if key.endswith("experts.gate_up_proj"):
        gate, up = np.split(data, 2, axis=1)
        base = key.removesuffix("gate_up_proj")
        return [(f"{names.get_name(f'{base}{part}_proj')}.weight", d) for part, d in (("gate", gate), ("up", up))]
    module, _, suffix = key.rpartition(".")
    if (whole := names.get_name(key)) is not None:  # a parameter of a module that is no linear and no norm
        return [(f"{whole}.weight", data)]
    if table == "llama" and (found := re.search(r"\.(q|k)_proj$", module)):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        data = data.reshape(heads, 2, len(data) // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
    if table.startswith("gemma") and module.endswith("norm"):
        data = data + 1
    if module.endswith("shared_expert_gate"):
        data = data[0]
    return [(f"{names.get_name(module)}.{suffix}", data)]


def _add_tokenizer(writer, folder):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens[-1] = "ab"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)


def _build(architecture, target, **fields):
    """A tiny checkpoint whose config differs from the usual one, because files of its form cannot say all of it."""
    config = AutoConfig.for_model(architecture, **(tiny_fields(architecture, 2, 64) | fields))
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    shutil.copy(TinyModel("llama").folder() / "tokenizer.json", target)
    return target


@pytest.mark.parametrize(("architecture", "fields"), READ.items())
def test_a_file_gives_the_model_that_it_was_made_from(architecture, fields, windows, tmp_path, logits_of):
    folder = _build(architecture, tmp_path, **fields)
    model = LayeredModel(GgufModel(str(_write(folder, tmp_path / "model.gguf"))).folder())
    assert model.config.model_type == architecture
    logits = logits_of(model, [model.load_layer(index) for index in range(model.depth)], windows)
    expected = AutoModelForCausalLM.from_pretrained(folder)(windows).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def _write_empty(path, architecture):
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", UNREAD)
def test_an_architecture_that_transformers_does_not_read_is_refused_in_one_line(architecture, tmp_path):
    """llama.cpp writes Mixtral's files as those of Llama, so `mixtral` itself is no architecture of a file."""
    path = _write_empty(tmp_path / "model.gguf", architecture)
    unread = rf"'{architecture}', whose GGUF files transformers does not read\. Choose .*hf"
    with pytest.raises(UserError, match=unread):
        GgufModel(str(path)).folder()


def test_a_file_without_sizes_is_refused_before_a_model_is_built(tmp_path):
    path = _write_empty(tmp_path / "model.gguf", "gpt-oss")
    with pytest.raises(UserError, match="does not say how many layers it has"):
        GgufModel(str(path)).folder()


def test_a_file_of_which_transformers_reads_only_a_part_is_refused(tmp_path):
    """transformers would fill the rest with random numbers, as it would do with the experts of a Mixtral."""
    folder = TinyModel("llama").folder()
    path = _write(folder, tmp_path / "model.gguf", left_out="blk.1.ffn_down.weight")
    named = r"^model\.path: transformers finds 1 .* not in .*, such as '[a-z.]*1\.mlp\.down_proj\.weight'"
    with pytest.raises(UserError, match=named):
        GgufModel(str(path)).folder()


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda to: to.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "scales its rotary frequencies"),
        (lambda to: to.add_string("qwen2.rope.scaling.type", "yarn"), "scales its rotary frequencies"),
        (lambda to: to.add_uint32("qwen2.rope.dimension_count", 8), "rotates 8 channels of each head"),
    ],
    ids=["factors", "scaling", "partial"],
)
def test_a_rotation_that_transformers_does_not_read_is_refused(add, message, tmp_path):
    """Llama 3.1 and later have factors. transformers would use the unscaled frequencies without a word."""
    path = _write(TinyModel("qwen2").folder(), tmp_path / "model.gguf", add=add)
    with pytest.raises(UserError, match=message):
        GgufModel(str(path)).folder()


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + bytes(60), b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_damaged_gguf(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.path: .* is damaged"):
        GgufModel(str(path)).folder()


def _gguf(*parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + b"".join(parts)


KEY = struct.pack("<Q", 1) + b"k"
ENDLESS = _gguf(KEY, struct.pack("<IIQ", 9, 0, 2**60))  # an array that the gguf package would read for years
NESTED = _gguf(KEY, struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 2000)


@given(content=st.one_of(st.binary(max_size=60).map(_gguf), st.sampled_from([ENDLESS, NESTED])))
def test_any_gguf_is_refused_in_one_line(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^model\.path: '.*model\.gguf' is damaged[^\n]*$"):
        convert_gguf(path, path.parent)
