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
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)
from two_tiers import finished

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.measure.perplexity import score_windows, summary
from haq_lab.models.families.family import PROJECTIONS, Moe
from haq_lab.models.families.float_share import FloatShare
from haq_lab.models.families.layer_kinds import LayerKinds
from haq_lab.models.families.lookup import FAMILIES
from haq_lab.models.families.tiny import tiny_fields
from haq_lab.models.generic import family_for, generic_family
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.random_tiny import byte_tokenizer
from haq_lab.models.sources import TinyModel
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.session import OffloadSession
from haq_lab.offload.settings import Offload
from haq_lab.pipeline.deployment import load_checkpoint
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothquant import SmoothQuant
from haq_lab.result_cache.keys import of_settings
from haq_lab.result_cache.store import Store
from haq_lab.runtime.deploy import deploy
from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.errors import UserError
from tests.models.families.test_mixtures import decoded

# One norm before three linears; a fused projection and LayerNorms with biases; one norm for attention and MLP;
# gains of 1 + weight. And a Mixture of Experts with a dense first layer.
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


def save_model(folder: Path, architecture: str) -> Path:
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
    return save_model(tmp_path / "model", architecture)


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
        for group in kinds.groups(index):
            for name in group.consumers:
                norm = group.source if group.kind == "norm" else None
                assert in_table.get(name) in (None, (norm, group.gain_offset)), name


# Gemma 4 gives its layers a dict for shared keys and values, even if nothing is shared, so the probe refuses it.
MIXTURES = [family.model_type for family in FAMILIES if family.moe is not None and family.model_type != "gemma4_text"]


@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_experts_are_those_of_the_table(architecture):
    """Fused in any layout, with and without biases, and routers of all forms."""
    config = AutoConfig.for_model(architecture, **tiny_fields(architecture, 2, 64))
    family, table = generic_family(config), family_for(config, None)
    found, moe = family.moe, table.moe
    assert (found.router, found.experts, found.router_buffers) == (moe.router, moe.experts, moe.router_buffers)
    for size in (Moe.count, Moe.active, Moe.width):
        assert size(found, config) == size(moe, config)
    # Names that differ from ours cannot be known, so the experts are exported as fused tensors.
    assert found.fused == (moe.fused or moe.stored != PROJECTIONS or bool(table.renamed))
    kinds, index = LayerKinds(family, config), LayerKinds(table, config).moe_layers[0]
    groups = [
        {
            group.consumers[-1]: (group.source, {*group.readers})
            for group in own.groups(index)
            if expert_of(group.consumers[-1])
        }
        for own in (kinds, LayerKinds(table, config))
    ]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("module", [Qwen3MoeExperts, Qwen3MoeTopKRouter])
def test_what_is_not_proven_to_be_an_expert_stays_in_float(module, monkeypatch, tmp_path):
    """Experts that compute something else, and a router whose choice is not the experts' one."""
    forward = module.forward
    if module is Qwen3MoeExperts:
        monkeypatch.setattr(module, "forward", lambda *arguments: forward(*arguments) + 1)
    else:
        monkeypatch.setattr(module, "forward", lambda *arguments: (*forward(*arguments), None))
        block = Qwen3MoeSparseMoeBlock
        monkeypatch.setattr(block, "forward", lambda self, x: self.experts(x[0], *self.gate(x[0])[2:0:-1])[None])
    model = LayeredModel(TinyModel("qwen3_moe").folder(), family="generic")
    assert model.family.moe is None
    assert "mlp.experts" in FloatShare.of(model.kinds, 2).by_module
    with pytest.raises(UserError, match=r"offload: .* finds no experts in a 'qwen3_moe' .* offload=none, or add a row"):
        OffloadSession(Offload(), None, model, tmp_path, Store())


@pytest.mark.parametrize("architecture", ["dots1"])
def test_offloading_does_not_change_a_bit(model, windows, tmp_path):
    expected = decoded(deploy(model.assemble(finished(model)), model, CpuBackend()))
    settings = Offload(budget=4, spare=2, eviction="lru", placement="frequency", prefetch="next_gate")
    session = OffloadSession(settings, None, model, tmp_path / "experts", Store())
    layers = finished(model, session.add)
    session.find_profile(None, windows, "random")
    whole = deploy(model.assemble(layers), model, CpuBackend())
    session.engage(layers)
    assert torch.equal(decoded(whole), expected)
    shape, cache = Shape.of(model.config, family=model.family), whole(windows[:1, :5], use_cache=True).cache
    assert shape.kv_per_token * 5 == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert session.metrics()["offload.bytes_moved"] > 0
    session.close()


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
