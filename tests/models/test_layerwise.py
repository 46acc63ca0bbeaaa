"""The layer-by-layer forward equals that of transformers, and unusable checkpoints are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig

from haq_lab.models import layerwise as layered
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.utils.errors import UserError
from haq_lab.utils.hugging_face import quiet_transformers

SMALL = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
VARIANTS = {
    "opt_post_norm": OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False, init_std=0.1),
    "opt_no_bias": OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, enable_bias=False, init_std=0.1),
    "opt_plain_norm": OPTConfig(**SMALL, ffn_dim=96, layer_norm_elementwise_affine=False, word_embed_proj_dim=64),
    "llama_biases": LlamaConfig(
        **SMALL, intermediate_size=96, num_key_value_heads=1, attention_bias=True, mlp_bias=True, initializer_range=0.1
    ),
    "mistral_window": MistralConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, sliding_window=8, head_dim=8),
}


def whole_of(folder: Path) -> torch.nn.Module:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(config, folder: Path) -> Path:
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def tampered(model: LayeredModel, folder: Path, change) -> Path:
    """Return a copy of a checkpoint whose tensors `change` has modified."""
    shutil.copytree(model.folder, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, metadata={"format": "pt"})
    return folder


def test_equals_the_models_own_forward(tiny, windows, logits_of, monkeypatch):
    monkeypatch.setattr(layered, "TOKENS_PER_BATCH", 96)  # batches of 2, 2 and 1
    layers = [tiny.load_layer(index) for index in range(tiny.depth)]
    expected = whole_of(tiny.folder)(windows).logits
    torch.testing.assert_close(logits_of(tiny, layers, windows), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(tiny.assemble(layers)(windows).logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_their_own_forward(variant, windows, logits_of, tmp_path):
    model = LayeredModel(save(VARIANTS[variant], tmp_path))
    layers = [model.load_layer(index) for index in range(model.depth)]
    expected = whole_of(tmp_path)(windows).logits
    torch.testing.assert_close(logits_of(model, layers, windows), expected, rtol=1e-5, atol=1e-5)


def test_windows_of_different_lengths_get_their_own_arguments(tiny, windows, logits_of):
    layers = [tiny.load_layer(index) for index in range(tiny.depth)]
    long = logits_of(tiny, layers, windows)
    short = logits_of(tiny, layers, windows[:, :7])
    torch.testing.assert_close(short, long[:, :7], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits_of(tiny, layers, windows), long)


def test_assembled_model_decodes_with_a_cache_and_leaves_the_shell_alone(tiny, windows):
    whole = tiny.assemble([tiny.load_layer(index) for index in range(tiny.depth)])
    expected = whole(windows).logits
    first = whole(windows[:, :-1], use_cache=True)
    last = whole(windows[:, -1:], cache=first.cache, use_cache=True).logits
    torch.testing.assert_close(last[:, 0], expected[:, -1], rtol=1e-4, atol=1e-4)
    assert list(tiny.shell.get_submodule(tiny.family.layers)) == tiny.recorders
    assert list(whole.get_submodule(tiny.family.layers)) != tiny.recorders


def test_tied_embeddings_are_one_tensor():
    shell = LayeredModel(TinyModel("llama").folder()).shell
    assert shell.get_output_embeddings().weight.data_ptr() == shell.get_input_embeddings().weight.data_ptr()
    assert shell.get_input_embeddings().weight.abs().sum() > 0


def test_checkpoint_without_the_prefix(tiny, windows, logits_of, tmp_path):
    folder = tampered(
        tiny, tmp_path / "bare", lambda tensors: {name.removeprefix("model."): x for name, x in tensors.items()}
    )
    assert all(not name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    bare = LayeredModel(folder)
    layers = [bare.load_layer(index) for index in range(bare.depth)]
    torch.testing.assert_close(logits_of(bare, layers, windows), whole_of(tiny.folder)(windows).logits)


def test_reads_sharded_checkpoints(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "shards")
    tensors = load_file(tmp_path / "shards" / "model.safetensors")
    (tmp_path / "shards" / "model.safetensors").unlink()
    where = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for part in sorted(set(where.values())):
        save_file({name: tensors[name] for name in tensors if where[name] == part}, tmp_path / "shards" / part)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    model = LayeredModel(tmp_path / "shards")
    expected = tiny.load_layer(1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.load_layer(1).state_dict().items())

    index.write_text(json.dumps({"weight_map": {**where, "more": "part-2.safetensors"}}))
    with pytest.raises(UserError, match=r"names 'part-2\.safetensors', which does not exist"):
        LayeredModel(tmp_path / "shards")
    index.write_text("{")
    with pytest.raises(UserError, match="not a readable index"):
        LayeredModel(tmp_path / "shards")


def layer_tensor(tensors: dict, suffix: str) -> str:
    return next(name for name in tensors if "layers.1." in name and name.endswith(suffix))


def test_missing_layer_tensor(tiny, tmp_path):
    model = LayeredModel(
        tampered(tiny, tmp_path / "m", lambda t: {n: x for n, x in t.items() if n != layer_tensor(t, "q_proj.weight")})
    )
    model.load_layer(0)
    with pytest.raises(UserError, match=r"(?s)layer 1 .*self_attn\.q_proj\.weight"):
        model.load_layer(1)


def test_missing_embedding(tiny, tmp_path):
    folder = tampered(tiny, tmp_path / "m", lambda t: {n: x for n, x in t.items() if "embed_tokens" not in n})
    with pytest.raises(UserError, match=r"lacks the tensors .*embed_tokens"):
        LayeredModel(folder)


def test_wrong_shapes(tiny, tmp_path):
    def shrink(tensors):
        for name in (layer_tensor(tensors, "q_proj.weight"),):
            tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(UserError, match="does not fit its config"):
        LayeredModel(tampered(tiny, tmp_path / "layer", shrink)).load_layer(1)

    def shrink_embedding(tensors):
        name = next(name for name in tensors if "embed_tokens" in name)
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(UserError, match="do not fit its config"):
        LayeredModel(tampered(tiny, tmp_path / "shell", shrink_embedding))


def test_old_checkpoints_rotary_buffers_are_ignored(tiny, tmp_path):
    if tiny.family.model_type == "opt":
        pytest.skip("OPT has no rotary embedding")

    def add(tensors):
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    LayeredModel(tampered(tiny, tmp_path / "m", add)).load_layer(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny, tmp_path, bad):
    def spoil(tensors):
        tensors[layer_tensor(tensors, "v_proj.weight")][3, 5] = bad

    model = LayeredModel(tampered(tiny, tmp_path / "m", spoil))
    with pytest.raises(UserError, match=r"v_proj\.weight.* has NaN or infinite entries"):
        model.load_layer(1)


def test_truncated_safetensors(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        LayeredModel(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "lama"}', r"'lama' is not in the family table .*did you mean 'llama'"),
        ('{"model_type": "gpt2"}', r"'gpt2' is not in the family table .*llama, mistral, mixtral"),
        ("{}", "cannot be used .*model_type"),
        ("[1]", "cannot be used"),
        ("{", "cannot be used"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot be used"),
        ('{"model_type": "opt", "activation_function": "gelu"}', "this variant of 'opt'"),
    ],
)
def test_configs_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        LayeredModel(tmp_path)


def test_computes_in_the_requested_dtype(tiny):
    model = LayeredModel(tiny.folder, torch.bfloat16)
    assert {x.dtype for x in model.load_layer(0).parameters()} == {torch.bfloat16}
    assert model.embed(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.bfloat16


def test_changing_a_layer_in_place_does_not_touch_the_file(tiny):
    layer = tiny.load_layer(0)
    for parameter in layer.parameters():
        parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in tiny.load_layer(0).parameters())


def test_tokenizer(tiny, tmp_path):
    ids = tiny.tokenizer()("héllo")["input_ids"]
    assert tiny.tokenizer().decode(ids) == "héllo"
    assert len(ids) == 6
    shutil.copy(tiny.folder / "config.json", tmp_path)
    shutil.copy(tiny.folder / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match="no usable tokenizer"):
        LayeredModel(tmp_path).tokenizer()


def _changed(folder: Path, change) -> LayeredModel:
    """Return a tiny Llama whose tensors `change` has modified."""
    copied = Path(shutil.copytree(TinyModel("llama").folder(), folder / "changed"))
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def test_a_head_in_the_file_is_used_even_if_config_ties_it(tmp_path, windows, logits_of):
    """transformers ties only tensors that are equal, or of which one is missing."""
    folder = _changed(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(257, 64)}))
    model = LayeredModel(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = [model.load_layer(index) for index in range(model.depth)]
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(model, layers, windows), whole(windows).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_other_floating_types_are_converted_as_in_transformers(dtype, tmp_path, windows, logits_of):
    def narrow(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items() if "proj" in name})

    folder = _changed(tmp_path, narrow)
    model = LayeredModel(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = [model.load_layer(index) for index in range(model.depth)]
    torch.testing.assert_close(logits_of(model, layers, windows), whole(windows).logits, rtol=1e-5, atol=1e-5)


def test_weights_in_int8_are_refused_by_name(tmp_path):
    def quantise(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = (tensors[name] * 50).to(torch.int8)

    model = LayeredModel(_changed(tmp_path, quantise))
    with pytest.raises(UserError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' .* has type int8"):
        model.load_layer(1)


def test_what_stays_of_a_layer_does_not_keep_the_file_in_memory():
    """A norm is no view of the mapped file, whose pages would stay when the layer's matrices are quantised."""
    layer = LayeredModel(TinyModel("llama").folder()).load_layer(0)
    for name, weight in layer.named_parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes, name
