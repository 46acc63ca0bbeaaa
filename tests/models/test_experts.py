"""Split experts are views, compute what the fused experts compute, and are summed in a fixed order."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from haq_lab.models.experts import Experts, dispatch
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from tests.models.test_layerwise import whole_of

MOE = ["mixtral", "qwen3_moe", "olmoe"]


@pytest.mark.parametrize("architecture", MOE)
def test_split_experts_are_views_and_give_the_same_output(tiny):
    fused = whole_of(tiny.folder).get_submodule(f"{tiny.family.layers}.1.{tiny.family.moe.experts}")
    experts = Experts.unfused(fused)
    assert len(experts) == tiny.experts
    half = fused.gate_up_proj.shape[1] // 2
    for number, expert in enumerate(experts):
        assert expert.gate_proj.weight.data_ptr() == fused.gate_up_proj[number].data_ptr()
        assert expert.up_proj.weight.data_ptr() == fused.gate_up_proj[number, half:].data_ptr()
        assert expert.down_proj.weight.data_ptr() == fused.down_proj[number].data_ptr()
    hidden = torch.randn(40, 64)
    chosen = torch.stack([torch.randperm(tiny.experts)[:2] for _ in range(40)])
    weights = torch.rand(40, 2)
    torch.testing.assert_close(experts(hidden, chosen, weights), fused(hidden, chosen, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", MOE)
def test_linears_share_memory_with_the_tensors_that_were_read(tiny, monkeypatch):
    read = {}
    original = tiny.weights.read

    def remember(names, dtype=None):
        tensors = original(names, dtype)
        read.update({tiny.family.module_name(name).partition("layers.0.")[2]: x for name, x in tensors.items()})
        return tensors

    monkeypatch.setattr(tiny.weights, "read", remember)
    layer = tiny.load_layer(0)
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 4 + 3 * tiny.experts
    for name, linear in linears.items():
        assert linear.weight.data_ptr() == read[f"{name}.weight"].data_ptr(), "no second copy"


@pytest.mark.parametrize("architecture", MOE)
def test_checkpoints_with_fused_experts_are_split_into_views(tiny, tmp_path, windows, logits_of):
    """transformers saves such checkpoints with `save_original_format=False`."""
    whole = whole_of(tiny.folder)
    shutil.copytree(tiny.folder, tmp_path / "fused")
    save_file({name: x.clone() for name, x in whole.state_dict().items()}, tmp_path / "fused" / "model.safetensors")
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "fused" / "model.safetensors"))
    model = LayeredModel(tmp_path / "fused")
    layers = [model.load_layer(index) for index in range(model.depth)]
    expert = layers[0].get_submodule(f"{tiny.family.moe.experts}.1")
    storage = expert.gate_proj.weight.untyped_storage()
    assert storage.data_ptr() == expert.up_proj.weight.untyped_storage().data_ptr()
    assert storage.nbytes() == tiny.experts * 2 * expert.up_proj.weight.nbytes
    expected = whole(windows).logits
    torch.testing.assert_close(logits_of(model, layers, windows), expected, rtol=1e-5, atol=1e-4)


@given(st.integers(0, 2**16), st.integers(0, 12), st.integers(1, 3), st.integers(3, 6))
def test_dispatch_equals_token_by_token(seed, tokens, k, experts):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 5, generator=generator)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)] or [torch.zeros(k)])
    chosen = chosen[:tokens].long()
    weights = torch.rand(tokens, k, generator=generator)
    seen = []

    def run(number, rows):
        seen.append(number)
        return hidden[rows] * (number + 1)

    got = dispatch(hidden, chosen, weights, run)
    expected = torch.zeros(tokens, 5)
    for token in range(tokens):
        for rank in range(k):
            expected[token] += hidden[token] * (int(chosen[token, rank]) + 1) * weights[token, rank]
    assert torch.equal(got, expected)
    assert sorted(seen) == sorted(set(chosen.flatten().tolist())), "each active expert once, no other"


def test_a_tokens_result_does_not_depend_on_the_others():
    model = LayeredModel(TinyModel("mixtral").folder())
    layer, hidden = model.load_layer(0), torch.randn(9, 64)
    _, weights, chosen = layer.mlp.gate(hidden)
    # A product's rounding may differ with its rows; the summing must not.
    values = torch.randn(model.experts, 9, 64)
    together = dispatch(hidden, chosen, weights, lambda number, rows: values[number, rows])
    for token in range(9):
        one = slice(token, token + 1)
        alone = dispatch(hidden[one], chosen[one], weights[one], lambda number, rows, t=token: values[number, t][None])
        assert torch.equal(alone[0], together[token])
