"""Test the rows of the family table."""

from __future__ import annotations

import pytest
from transformers import MixtralConfig, OlmoeConfig, OPTConfig, Qwen3MoeConfig

from haq_lab.models.families.family import Group
from haq_lab.models.families.layer_kinds import LayerKinds
from haq_lab.models.families.lookup import FAMILIES, family_of
from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.errors import UserError


def groups_of(config):
    return LayerKinds(family_of(config), config).groups(0)


def test_mixtral_groups():
    groups = groups_of(MixtralConfig(num_local_experts=3))
    assert [group.source for group in groups] == [
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.experts.0.up_proj",
        "mlp.experts.1.up_proj",
        "mlp.experts.2.up_proj",
    ]
    norm = groups[2]
    assert norm.float_consumers == ("mlp.gate",)
    assert norm.site == "mlp.gate"
    assert norm.readers == (*norm.consumers, "mlp.gate")
    assert norm.expert is None
    assert norm.consumers_by_expert() == {
        e: (f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj") for e in range(3)
    }
    assert groups[4].consumers == ("mlp.experts.1.down_proj",)
    assert groups[4].expert == 1


@pytest.mark.parametrize("config", [MixtralConfig(), Qwen3MoeConfig(), OlmoeConfig()], ids=lambda c: c.model_type)
def test_every_expert_has_its_projections_in_groups(config):
    family = family_of(config)
    count = family.experts(config)
    names = [name for group in groups_of(config) for name in group.consumers]
    assert len(names) == len(set(names)) == 4 + 3 * count
    assert {expert_of(name) for name in names} == {None, *range(count)}


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MixtralConfig(intermediate_size=96), (8, 2, 96, True)),
        (Qwen3MoeConfig(intermediate_size=96, moe_intermediate_size=32, norm_topk_prob=True), (128, 8, 32, True)),
        (OlmoeConfig(intermediate_size=96), (64, 8, 96, False)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_moe_reads_its_sizes_from_the_config(config, sizes):
    moe = family_of(config).moe
    assert (moe.count(config), moe.active(config), moe.width(config), moe.is_normalized(config)) == sizes
    assert moe.linears(3) == tuple(f"mlp.experts.3.{name}_proj" for name in ("gate", "up", "down"))


def test_dense_families_have_no_experts():
    family = family_of(OPTConfig())
    assert family.experts(OPTConfig()) == 0
    assert all(group.consumers_by_expert() == {None: group.consumers} for group in groups_of(OPTConfig()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OlmoeConfig(clip_qkv=8.0), r"this variant of 'olmoe' is not supported: clip_qkv=8\.0"),
        (OPTConfig(activation_function="gelu"), "this variant of 'opt' is not supported: activation_function='gelu'"),
    ],
)
def test_unsupported_variants_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        family_of(config)


def test_mixtral_names_convert_both_ways():
    family = family_of(MixtralConfig())
    pairs = {
        "model.layers.3.block_sparse_moe.experts.7.w1.weight": "model.layers.3.mlp.experts.7.gate_proj.weight",
        "model.layers.3.block_sparse_moe.experts.7.w3.weight": "model.layers.3.mlp.experts.7.up_proj.weight",
        "model.layers.3.block_sparse_moe.experts.7.w2.weight": "model.layers.3.mlp.experts.7.down_proj.weight",
        "model.layers.3.block_sparse_moe.gate.weight": "model.layers.3.mlp.gate.weight",
        "model.layers.3.self_attn.q_proj.weight": "model.layers.3.self_attn.q_proj.weight",
    }
    for theirs, ours in pairs.items():
        assert family.module_name(theirs) == ours
        assert family.checkpoint_name(ours) == theirs


def test_expert_numbers():
    assert expert_of("mlp.experts.12.down_proj") == 12
    assert expert_of("mlp.gate") is None
    assert expert_of("self_attn.q_proj") is None
    assert Group("norm", None, ("mlp.experts.1.up_proj",)).expert is None


def test_smoothquant_strengths_match_the_paper():
    strengths = {family.model_type: family.smoothquant_strength for family in FAMILIES}
    assert (strengths["opt"], strengths["llama"], strengths["mistral"], strengths["mixtral"]) == (0.5, 0.85, 0.8, 0.8)
