"""A checkpoint that is loaded with offloading: same output, counted experts, and an expert file that is reused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from launching import TINY, launch
from transformers import AutoConfig, AutoModelForCausalLM

import haq_lab
import haq_lab.hf  # registers the method
from haq_lab.checkpoint.manifest import ROUTING, Manifest
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.config.backends import make_backend
from haq_lab.routing.record import record_trace
from haq_lab.utils.errors import UserError

HALF = {"offload": "haq", "budget": "50%", "spare": 2}
FIXED = {**HALF, "eviction": "none"}  # the experts that are resident at the start stay


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a tiny Mixtral, whose run recorded the router's choices."""
    return _write(tmp_path_factory.mktemp("mixtral"), "quantizer=haq")


def _write(folder: Path, *overrides: str) -> Path:
    where = [f"checkpoint.dir={folder / 'checkpoint'}", f"hydra.run.dir={folder / 'run'}", *overrides]
    outcome = launch(*TINY, "model=tiny_mixtral", *where)
    assert outcome.code == 0, outcome.err
    return folder / "checkpoint"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@torch.no_grad()
def test_offloading_changes_no_bit(checkpoint, windows, backend):
    plain, _ = haq_lab.load(checkpoint, backend)
    offloaded, _ = haq_lab.load(checkpoint, backend, **HALF)
    assert torch.equal(offloaded(windows).logits, plain(windows).logits)
    prompt = windows[:1, :5]
    expected = plain.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(offloaded.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    assert offloaded.offload.stats()["misses"] > 0
    assert offloaded.offload.engine.recorder.decoded == 0, "memory does not grow with each token"


@torch.no_grad()
def test_stats_count_what_the_router_chose(checkpoint, windows):
    model, _ = haq_lab.load(checkpoint, "reference", **FIXED)
    residents = model.offload.residents()
    assert residents.sum() == residents.size // 2 - 2, "half of the experts, less the spare slots"
    loaded = model.offload.stats()["bytes_moved"]
    model(windows[:1])
    chosen = record_trace(QuantizedModel(checkpoint, make_backend("reference")), windows[:1], "").experts
    resident = residents[np.arange(chosen.shape[1])[None, :, None], chosen]
    distinct = sum(len(np.unique(chosen[:, layer][~resident[:, layer]])) for layer in range(chosen.shape[1]))
    stats = model.offload.stats()
    assert (stats["hits"], stats["misses"]) == (resident.sum(), (~resident).sum())
    assert stats["bytes_moved"] - loaded == distinct * model.offload.engine.slow_tier.layouts.largest
    assert "prefetch_accuracy" not in stats
    experts = model.offload.expert_stats()
    at = np.broadcast_to(np.arange(chosen.shape[1])[None, :, None], chosen.shape)
    for name, counted in (("hits", resident), ("misses", ~resident)):
        expected = np.zeros_like(experts[name])
        np.add.at(expected, (at[counted], chosen[counted]), 1)
        np.testing.assert_array_equal(experts[name], expected)
    assert experts["bytes_moved"].sum() == stats["bytes_moved"]
    np.testing.assert_array_equal(model.offload.residents(), residents)


@torch.no_grad()
def test_experts_stay_between_requests(checkpoint, windows):
    model, _ = haq_lab.load(checkpoint, "reference", offload="haq", budget="100%", prefetch="next_gate")
    loaded = model.offload.stats()["bytes_moved"]
    for _ in range(2):
        model(windows)
    stats = model.offload.stats()
    assert stats["misses"] == 0
    assert stats["bytes_moved"] == loaded
    assert stats["prefetch_accuracy"] == 0, "nothing had to be prefetched"


@torch.no_grad()
def test_the_expert_file_is_written_once(checkpoint, windows, cache):
    first, _ = haq_lab.load(checkpoint, "reference", **HALF)
    expected = first(windows).logits
    (file,) = cache.glob("experts/*/experts.bin")
    written = file.stat()
    second, _ = haq_lab.load(checkpoint, "reference", **HALF)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert torch.equal(second(windows).logits, expected)
    assert [path.name for path in file.parent.iterdir()] == ["experts.bin"]


@pytest.mark.parametrize("damage", ["changed", "truncated", "longer"])
@torch.no_grad()
def test_a_damaged_expert_file_is_written_again(checkpoint, windows, cache, damage):
    plain, _ = haq_lab.load(checkpoint, "reference")
    haq_lab.load(checkpoint, "reference", **HALF)
    (file,) = cache.glob("experts/*/experts.bin")
    whole = file.read_bytes()
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.write_bytes({"changed": changed, "truncated": whole[:middle], "longer": whole + b"x"}[damage])
    model, _ = haq_lab.load(checkpoint, "reference", **HALF)
    assert file.read_bytes() == whole
    assert torch.equal(model(windows).logits, plain(windows).logits)


def test_an_interrupted_load_leaves_no_expert_file(checkpoint, cache, monkeypatch):
    new_layer = QuantizedModel.new_layer

    def interrupted(self, index):
        if index == 1:
            raise KeyboardInterrupt
        return new_layer(self, index)

    monkeypatch.setattr(QuantizedModel, "new_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        haq_lab.load(checkpoint, "reference", **HALF)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_the_checkpoint_has_the_routing_of_its_calibration(checkpoint):
    assert ROUTING in Manifest.read(checkpoint).files
    assert QuantizedModel(checkpoint, make_backend("reference")).routing().layers == 2


def test_a_checkpoint_without_routing_records_it_once(tmp_path, cache):
    folder = _write(tmp_path, "quantizer=rtn")
    assert ROUTING not in Manifest.read(folder).files
    residents = [haq_lab.load(folder, "reference", **HALF)[0].offload.residents() for _ in range(2)]
    np.testing.assert_array_equal(*residents)
    assert len(list(cache.glob(f"experts/*/{ROUTING}"))) == 1


@torch.no_grad()
def test_from_pretrained_offloads(checkpoint, windows):
    config = AutoConfig.from_pretrained(checkpoint)
    settings = {"budget": "50%", "spare": 2}
    config.quantization_config |= {"backend": "reference", "offload": "haq", "offload_settings": settings}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
    plain, _ = haq_lab.load(checkpoint, "reference")
    assert torch.equal(model(windows).logits, plain(windows).logits)
    assert model.offload.stats()["misses"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "40%"}, "offload.budget has no effect because offload=none"),
        ({"offload": "haqq"}, "offload: 'haqq' is not one of .*'haq'"),
        ({"offload": "haq", "bugdet": "40%"}, "offload.bugdet.*'budget'"),
        ({"offload": "haq", "budget": "40"}, None),
        ({"offload": "haq", "budget": "four"}, "offload.budget: 'four' is not"),
        ({"offload": "haq", "host_format": "bf16"}, "offload.host_format: 'bf16' does not work"),
    ],
)
def test_a_mistake_is_one_message(checkpoint, settings, message):
    if message is None:
        assert haq_lab.load(checkpoint, "reference", **settings)[0].offload.residents().any()
        return
    with pytest.raises(UserError, match=message) as raised:
        haq_lab.load(checkpoint, "reference", **settings)
    assert "\n" not in str(raised.value)


def test_a_dense_model_has_no_experts_to_offload(tmp_path):
    folder = haq_lab.quantize("tiny_llama", "rtn", out=tmp_path / "llama")
    with pytest.raises(UserError, match="offload: a 'llama' has no experts to offload"):
        haq_lab.load(folder, "reference", offload="haq")
