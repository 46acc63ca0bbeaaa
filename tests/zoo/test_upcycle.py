"""An upcycled model is a real Mixtral checkpoint that computes what the dense model computes."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from haq_lab.calibration.dataset import Calibration
from haq_lab.models.build_cache import record_files
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.utils.errors import UserError
from haq_lab.zoo.upcycle import UpcycledModel, router_rows, upcycle

TEXT = Calibration("python_docs", samples=4, seqlen=64)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the folders of a tiny Llama and of its upcycled model."""
    dense, target = TinyModel("llama").folder(), tmp_path_factory.mktemp("moe")
    upcycle(dense, target, experts=4, active=2, seed=0, text=TEXT)
    return dense, target


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_logits_equal_those_of_the_dense_model(pair, windows):
    dense = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.bfloat16).float()
    sparse, found = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32, output_loading_info=True)
    assert isinstance(sparse, MixtralForCausalLM)
    assert not any(found.values())
    torch.testing.assert_close(sparse(windows).logits, dense(windows).logits, rtol=1e-4, atol=1e-4)


def test_it_has_hub_names_bfloat16_and_one_shard_per_layer(pair):
    shards = sorted(pair[1].glob("*.safetensors"))
    assert len(shards) == 1 + 2
    layer = load_file(shards[1])
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in layer
    assert layer["model.layers.0.block_sparse_moe.gate.weight"].shape == (4, 64)
    assert {tensor.dtype for tensor in layer.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in load_file(shards[0]), "the head is tied to the embedding"


def test_the_seed_determines_the_bytes(pair, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        upcycle(pair[0], tmp_path / name, experts=4, active=2, seed=seed, text=TEXT)
    assert _contents(tmp_path / "same") == _contents(pair[1])
    assert _contents(tmp_path / "other") != _contents(pair[1])


def test_routing_is_sharp_and_follows_the_centred_input():
    generator = torch.Generator().manual_seed(3)
    centres = 8 * torch.eye(4, 16)  # equally far from their mean, so the largest logit is the nearest centroid's
    truth = torch.randint(0, 4, (2000,), generator=generator)
    points = centres[truth] + torch.randn(2000, 16, generator=generator) + 20.0
    rows = router_rows(points, experts=4, seed=0)
    logits = points @ rows.t()
    assert float(logits.softmax(1).amax(1).mean()) == pytest.approx(0.5, abs=0.01)
    chosen = logits.argmax(1)
    assert all(len(chosen[truth == cluster].unique()) == 1 for cluster in range(4)), "a cluster is one expert's"
    shifted = (points + 5 * points.mean(0)) @ rows.t()
    torch.testing.assert_close(shifted, logits, rtol=1e-3, atol=1e-3)


def test_it_is_read_a_layer_at_a_time_like_any_checkpoint(pair, windows, logits_of):
    model = LayeredModel(pair[1])
    logits = logits_of(model, [model.load_layer(index) for index in range(model.depth)], windows)
    whole = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    torch.testing.assert_close(logits, whole(windows).logits, rtol=1e-4, atol=1e-4)


def test_unsupported_dense_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="architecture 'opt' cannot be turned into a Mixtral"):
        upcycle(TinyModel("opt").folder(), tmp_path, experts=4, active=2, seed=0, text=TEXT)
    with pytest.raises(UserError, match=r"model\.active: 9 is more than the 8"):
        UpcycledModel(TinyModel("llama"), experts=8, active=9)


def test_the_check_detects_a_different_perplexity(monkeypatch):
    monkeypatch.setattr("haq_lab.zoo.upcycle.TEXT", TEXT)
    monkeypatch.setattr("haq_lab.zoo.sanity_check.SEQLEN", 64)
    source = UpcycledModel(TinyModel("llama"), experts=4)
    lines = source.check()
    assert any("first choice" in line for line in lines)
    folder = source.folder()
    shard = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    from safetensors.torch import save_file

    save_file(tensors | {name: 2 * tensors[name]}, shard, metadata={"format": "pt"})
    record_files(folder)  # else the change itself is refused
    try:
        with pytest.raises(UserError, match="Remove the folder and build it again"):
            source.check()
    finally:
        shutil.rmtree(folder)
