"""llama.cpp's own package and transformers read the exported GGUF file, and its weights are ours."""

from __future__ import annotations

import itertools
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from haq_lab.checkpoint.export.engines import export
from haq_lab.checkpoint.export.gguf_file import quantized_tensor
from haq_lab.checkpoint.export.gguf_metadata import frequency_factors
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import GgufModel
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.utils.errors import UserError

ROUNDING = 2**-11  # relative, of a scale to float16


def _read(path):
    """Return the metadata and the tensors (dequantised) of a file, and the tensors' types."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    return fields, tensors, {one.name: one.tensor_type.name for one in reader.tensors}


def _round_trip(weights):
    """Return weights after the usual rounding to Q8_0, with a scale for each block."""
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.dequantize(gguf.quantize(weights, kind), kind)


def _near(ours, theirs):
    np.testing.assert_allclose(theirs, ours.float().numpy(), rtol=ROUNDING, atol=1e-9)


def _llama_order(weight, heads):
    """Return the rows of a projection as `LlamaModel.permute` of convert_hf_to_gguf.py orders them."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral", "qwen3_moe"])
def test_the_weights_are_ours(write, dequantized, architecture, tmp_path):
    folder = write(HAQ(rotation="none"))
    export(folder, tmp_path / "model.gguf", "gguf")
    fields, tensors, types = _read(tmp_path / "model.gguf")
    model = QuantizedModel(folder, ReferenceBackend())
    layer = dequantized(model, model.load_layer(1)).state_dict()
    permuted = architecture in ("llama", "mixtral")
    for name, heads in (("q", 4), ("k", 2)):
        weight = layer[f"self_attn.{name}_proj.weight"]
        _near(_llama_order(weight, heads) if permuted else weight, tensors[f"blk.1.attn_{name}.weight"])
    _near(layer["self_attn.v_proj.weight"], tensors["blk.1.attn_v.weight"])
    _near(layer["post_attention_layernorm.weight"], tensors["blk.1.ffn_norm.weight"])
    if architecture in ("llama", "qwen3"):
        _near(layer["mlp.down_proj.weight"], tensors["blk.1.ffn_down.weight"])
        # llama.cpp uses the embedding if there is no head.
        assert ("output.weight" in tensors) == (not model.config.tie_word_embeddings)
    else:
        for name in ("gate", "up", "down"):
            experts = [layer[f"mlp.experts.{number}.{name}_proj.weight"] for number in range(model.experts)]
            _near(torch.stack(experts), tensors[f"blk.1.ffn_{name}_exps.weight"])
        _near(layer["mlp.gate.weight"], tensors["blk.1.ffn_gate_inp.weight"])
        assert types["blk.1.ffn_gate_inp.weight"] == "F32"
        assert types["blk.1.ffn_up_exps.weight"] == types["output.weight"] == "Q8_0"
        arch = fields["general.architecture"]
        assert fields[f"{arch}.expert_count"] == model.experts
        assert fields[f"{arch}.expert_used_count"] == 2
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert {*tmp_path.iterdir()} == {folder, tmp_path / "model.gguf"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_transformers_reads_it(write, dequantized, windows, logits_of, tmp_path):
    folder = write(HAQ(rotation="none"))
    _with_tokenizer(folder, _byte_level(BYTES))
    export(folder, tmp_path / "model.gguf", "gguf")
    ours = QuantizedModel(folder, ReferenceBackend())
    embedding = ours.shell.get_input_embeddings().weight  # the head too
    embedding.copy_(torch.from_numpy(_round_trip(embedding.numpy())))
    layers = [ours.load_layer(index) for index in range(ours.depth)]
    for module in itertools.chain.from_iterable(layer.modules() for layer in layers):
        if isinstance(module, Int8Linear):
            module.weight_scale.copy_(module.weight_scale.half())
    expected = logits_of(ours, [dequantized(ours, layer) for layer in layers], windows)
    theirs = LayeredModel(GgufModel(str(tmp_path / "model.gguf")).folder())
    logits = logits_of(theirs, [theirs.load_layer(index) for index in range(theirs.depth)], windows)
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    text = "for x in range(10):\n    print(x, 'ä')"
    assert theirs.tokenizer()(text)["input_ids"] == ours.tokenizer()(text)["input_ids"]


def test_levels_are_stored_unchanged():
    levels = torch.randint(-127, 128, (3, 64)).to(torch.int8)
    scale = torch.tensor([0.013, 1.7e-4, 2.0**-14])
    stored = quantized_tensor("name", levels, scale[:, None])
    assert stored.type.name == "Q8_0"
    np.testing.assert_array_equal(
        gguf.dequantize(stored.data, stored.type), (levels * scale.half().float()[:, None]).numpy()
    )
    requantised = _round_trip((levels * scale[:, None]).numpy())
    exact = (levels.double() * scale.double()[:, None]).numpy()
    assert np.abs(gguf.dequantize(stored.data, stored.type) - exact).max() < np.abs(requantised - exact).max() / 4


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_4_bit_weights_are_stored_unchanged_in_q4_0(write, dequantized, architecture, tmp_path):
    folder = write(RTN(weight_bits=4, group=32))
    export(folder, tmp_path / "model.gguf", "gguf")
    _, tensors, types = _read(tmp_path / "model.gguf")
    model = QuantizedModel(folder, ReferenceBackend())
    layer = dequantized(model, model.load_layer(1)).state_dict()
    _near(layer["self_attn.v_proj.weight"], tensors["blk.1.attn_v.weight"])
    assert types["blk.1.attn_v.weight"] == "Q4_0"
    if architecture == "mixtral":
        experts = [layer[f"mlp.experts.{number}.up_proj.weight"] for number in range(model.experts)]
        _near(torch.stack(experts), tensors["blk.1.ffn_up_exps.weight"])
        assert types["blk.1.ffn_up_exps.weight"] == "Q4_0"


@pytest.mark.parametrize("architecture", ["llama"])
def test_mixed_bits_are_stored_unchanged_in_q8_0(write, dequantized, architecture, tmp_path):
    folder = write(HAQ(rotation="none", weight_bits="auto", bits=6, group=32))
    export(folder, tmp_path / "model.gguf", "gguf")
    _, tensors, types = _read(tmp_path / "model.gguf")
    model = QuantizedModel(folder, ReferenceBackend())
    assert {format.bits for layer in model.weight_formats() for format in layer.values()} == {4, 8}
    for index in range(2):
        layer = dequantized(model, model.load_layer(index)).state_dict()
        _near(layer["mlp.down_proj.weight"], tensors[f"blk.{index}.ffn_down.weight"])
        assert types[f"blk.{index}.ffn_down.weight"] == "Q8_0"


def test_rows_that_fill_no_block_are_stored_in_float16():
    levels = torch.randint(-127, 128, (3, 48)).to(torch.int8)
    stored = quantized_tensor("name", levels, torch.full((3, 1), 0.25))
    assert stored.type.name == "F16"
    np.testing.assert_array_equal(stored.data, levels.numpy() / 4)


def _change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace(*_hashes(folder, "config.json"))
    )


def _hashes(folder, file):
    """Return the hash in the manifest and the hash of the present file."""
    from haq_lab.utils.atomic_files import sha256

    return json.loads((folder / "manifest.json").read_text())["files"][file], sha256(folder / file)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("opt", {}, r"architecture 'opt' is not supported\. Choose --for transformers"),
        ("olmoe", {}, r"num_key_value_heads is 2, but llama\.cpp's olmoe models need 4\."),
        ("qwen3_moe", {"norm_topk_prob": False}, r"norm_topk_prob is False, but .*qwen3moe models need True\."),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act is gelu, but llama\.cpp's llama models need silu\."),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"rope_type is dynamic, but llama\.cpp's llama models need default\.",
        ),
    ],
)
def test_models_that_llama_cpp_cannot_run_are_refused(write, fields, message, tmp_path):
    folder = write(RTN())
    _change_config(folder, **fields)
    with pytest.raises(UserError, match=f"export --for gguf: {message}"):
        export(folder, tmp_path / "model.gguf", "gguf")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("architecture", ["llama"])
def test_the_target_must_be_a_gguf_file(write, tmp_path):
    folder = write(RTN())
    with pytest.raises(UserError, match=r"does not end with \.gguf"):
        export(folder, tmp_path / "model", "gguf")
    with pytest.raises(UserError, match="'tgi' is not one of transformers, vllm, gguf"):
        export(folder, tmp_path / "model", "tgi")


@pytest.mark.parametrize("architecture", ["llama"])
def test_scaled_rotary_frequencies_are_exported(write, tmp_path):
    folder = write(RTN())
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    _change_config(folder, rope_parameters=rope | {"original_max_position_embeddings": 256})
    factors = frequency_factors(QuantizedModel(folder, ReferenceBackend()))
    assert factors[0] == 1  # the wavelength of 2 pi is shorter than 256 / 4
    assert factors[-1] == pytest.approx(8)  # that of 2 pi 10^(4 * 7 / 8) is longer than 256 / 1
    export(folder, tmp_path / "model.gguf", "gguf")
    _, tensors, _ = _read(tmp_path / "model.gguf")
    np.testing.assert_array_equal(tensors["rope_freqs.weight"], factors.numpy())


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLIT_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _byte_level(pre_tokenizer, **settings):
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"ab": 256}, merges=[("a", "b")], **settings))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    return tokenizer


def _sentencepiece():
    """Return a tokenizer with the form of Llama 2's."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(249)), "▁", "a", "b", "ab", "▁ab"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _with_tokenizer(folder, tokenizer):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace(*_hashes(folder, file)))


@pytest.mark.parametrize("architecture", ["llama"])
@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (_byte_level(BYTES), "gpt-2"),
        (_byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])), "smollm"),
        (
            _byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), SPLIT_BYTES])),
            "qwen2",
        ),
    ],
)
def test_the_pre_tokenizer_is_recognised(write, tokenizer, name, tmp_path):
    folder = write(RTN())
    tokenizer.add_tokens(["beyond the embedding"])
    _with_tokenizer(folder, tokenizer)
    export(folder, tmp_path / "model.gguf", "gguf")
    fields, _, _ = _read(tmp_path / "model.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.tokens"][256] == "ab"
    assert len(fields["tokenizer.ggml.tokens"]) == 257


@pytest.mark.parametrize("architecture", ["llama"])
def test_scores_of_a_sentencepiece_tokenizer_follow_the_merges(write, tmp_path):
    folder = write(RTN())
    _with_tokenizer(folder, _sentencepiece())
    export(folder, tmp_path / "model.gguf", "gguf")
    fields, _, _ = _read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"]
    assert fields["tokenizer.ggml.tokens"][-3:] == ["b", "ab", "▁ab"]
    assert fields["tokenizer.ggml.scores"][-3:] == [-2, 0, -1]  # the first merge has the highest score
    kinds = [gguf.TokenType(kind).name for kind in fields["tokenizer.ggml.token_type"]]
    assert kinds[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert kinds[-1] == "NORMAL"


@pytest.mark.parametrize("architecture", ["llama"])
@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (Tokenizer(models.WordLevel({"text": 0})), "it is of type WordLevel"),
        (
            _byte_level(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES])),
            "it has the pre-tokenizer",
        ),
    ],
)
def test_other_tokenizers_are_refused(write, tokenizer, reason, tmp_path):
    folder = write(RTN())
    _with_tokenizer(folder, tokenizer)
    with pytest.raises(UserError, match=rf"llama\.cpp has no tokenizer like that of '.*': {reason}"):
        export(folder, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_failed_export_leaves_nothing(write, tmp_path):
    folder = write(RTN())
    shutil.copy(folder / "layer-00000.safetensors", folder / "layer-00001.safetensors")
    with pytest.raises(UserError, match="layer-00001"):
        export(folder, tmp_path / "model.gguf", "gguf")
    assert list(tmp_path.iterdir()) == [folder]
