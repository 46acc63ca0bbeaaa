"""Architectures that the family table does not have: their layers are run to find what a row would say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import TINY as QUICK
from launching import launch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.measure.perplexity import score_windows, summary
from haq_lab.models.families.float_share import FloatShare
from haq_lab.models.families.generic import family_for, generic_family
from haq_lab.models.families.layer_kinds import LayerKinds
from haq_lab.models.families.tiny import tiny_fields
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.random_tiny import byte_tokenizer
from haq_lab.pipeline.deployment import load_checkpoint
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothquant import SmoothQuant
from haq_lab.result_cache.keys import of_settings
from haq_lab.utils.errors import UserError

# One norm before three linears; a fused projection and LayerNorms with biases; one norm for attention and MLP;
# gains of 1 + weight. And a Mixture of Experts with a dense first layer, whose fused experts stay in float.
ARCHITECTURES = ("ernie4_5", "persimmon", "phi", "nemotron", "dots1")
EXPERTS = {
    "n_routed_experts": 12,  # more than ten, so that the order of their names is not that of their numbers
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
QUANTIZERS = {"rtn": RTN(), "gptq": GPTQ(), "smoothquant": SmoothQuant()}


def _config(architecture: str, **fields):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    shape |= {"num_key_value_heads": 1, "vocab_size": 257, "max_position_embeddings": 256, "initializer_range": 0.1}
    return AutoConfig.for_model(architecture, **shape, **tokens, **fields)


def _save(folder: Path, architecture: str) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = _config(architecture, **(EXPERTS if architecture == "dots1" else {}))
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in whole.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    whole.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(architecture, tmp_path) -> Path:
    return _save(tmp_path / "model", architecture)


@pytest.fixture
def model(folder) -> LayeredModel:
    return LayeredModel(folder, family="generic")


def _pass(model: LayeredModel, quantizer, windows: Tensor, keep=lambda *_: None, writer=None):
    inputs = PassInputs(model, quantizer, ReferenceBackend(), windows.flip(0), CalibrationPolicy(), {"text": windows})
    return sequential_pass(inputs, keep, writer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_linear_is_quantised_and_full_precision_is_that_of_transformers(model, windows, quantizer):
    layers: list[nn.Module] = []
    result = _pass(model, QUANTIZERS[quantizer], windows, lambda index, layer: layers.append(layer))
    modules = [module for layer in layers for module in layer.modules()]
    assert sum(isinstance(module, Int8Linear) for module in modules) == len(result.reports) > 0
    assert not any(type(module) is nn.Linear for module in modules)
    smoothed = sum(report.smoothing_strength is not None for report in result.reports)
    assert (smoothed > 0) == (quantizer == "smoothquant")
    metrics = summary(*score_windows(model, windows, result.hidden["text"]), "text")
    whole = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    losses = [F.cross_entropy(whole(window[None]).logits[0, :-1], window[1:]) for window in windows]
    expected = math.exp(float(torch.stack(losses).mean()))
    assert metrics["perplexity_fp.text"] == pytest.approx(expected, rel=1e-5)
    assert metrics["perplexity_smoothed_fp.text"] == pytest.approx(expected, rel=1e-4)
    assert metrics["perplexity.text"] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("architecture", ["ernie4_5", "dots1"])
def test_a_checkpoint_loads_without_the_setting(model, windows, tmp_path):
    import haq_lab.hf  # noqa: F401  # registers the checkpoints with transformers

    writer = CheckpointWriter(tmp_path / "int8", model, {}, {}, force=False)
    result = _pass(model, GPTQ(), windows, writer=writer)
    writer.finish()
    writer.close()
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]["family"] == "generic"
    expected = model.head(result.hidden["text"]["quantized"])
    loaded = load_checkpoint(tmp_path / "int8", ReferenceBackend())[0]
    torch.testing.assert_close(loaded(windows).logits, expected, rtol=1e-4, atol=1e-4)
    through = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert through.generate(windows[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "olmo2", "glm4_moe", "deepseek_v3", "qwen3_next"])
def test_the_norms_are_those_of_the_table(architecture):
    """Of architectures that the table has: the same norms, with the same gains, feed the same linears."""
    config = AutoConfig.for_model(architecture, **tiny_fields(architecture, 2, 64))
    found, table = generic_family(config), LayerKinds(family_for(config, None), config)
    kinds = LayerKinds(found, config)
    for index in range(2):
        in_table = {
            name: (group.source if group.kind == "norm" else None, group.gain_offset)
            for group in table.groups(index)
            for name in group.consumers
        }
        # Fused experts also read the norm before the shared expert, and this factor cannot be proven.
        experts = table.moe(index) is not None
        for group in kinds.groups(index):
            for name in group.consumers:
                expected = (None, 0.0) if experts and name.startswith("mlp.") else in_table.get(name)
                assert expected in (None, (group.source, group.gain_offset)), name


def test_experts_and_routers_stay_in_float():
    config = _config("ernie4_5_moe", moe_num_experts=8, moe_k=2, moe_intermediate_size=32)
    family = generic_family(config)
    share = FloatShare.of(LayerKinds(family, config), 2)
    assert list(share.by_module)[:2] == ["mlp.experts", "mlp.gate"]
    assert 0.4 < share.share < 0.6
    phimoe = generic_family(AutoConfig.for_model("phimoe", **tiny_fields("phimoe", 2, 64)))
    assert phimoe.in_float == ("mlp.router",)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gpt2", "its layers cannot be run one by one"),
        ("falcon", "its layers return more than hidden states"),
    ],
)
def test_what_cannot_run_layer_by_layer_is_refused(architecture, reason):
    with pytest.raises(UserError, match=rf"model\.family: 'generic' does not support .*'{architecture}': ({reason})"):
        generic_family(AutoConfig.for_model(architecture, num_hidden_layers=2, vocab_size=257))


@pytest.mark.parametrize("architecture", ["ernie4_5"])
def test_the_row_is_found_again(model, folder):
    assert generic_family(model.config) == model.family
    assert of_settings(model) == {"family": "generic"}


@pytest.mark.parametrize("architecture", ["ernie4_5"])
def test_the_command(folder, tmp_path):
    arguments = [*QUICK, "model=hf", f"model.name={folder}", f"hydra.run.dir={tmp_path / 'run'}"]
    refused = launch(*arguments)
    assert (refused.code, "model.family=generic" in refused.err) == (2, True)
    outcome = launch(*arguments, "model.family=generic", "quantizer=gptq")
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert 0 < metrics["quantizer.float_share"] < 0.05
    unknown = launch(*arguments, "model.family=generik")
    assert (unknown.code, "generic" in unknown.err) == (2, True)
