"""The int8 head: it is used by assembled models, measured, written and read."""

from __future__ import annotations

import json

import pytest
import torch
from launching import TINY, launch

from haq_lab.checkpoint.export.engines import export
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear, parameter_count, to_float, weight_bytes
from haq_lab.models.layerwise import LayeredModel
from haq_lab.utils.errors import UserError


def assembled(model: LayeredModel) -> torch.nn.Module:
    return model.assemble([model.load_layer(index) for index in range(model.depth)])


def test_logits_equal_those_of_the_rounded_table(tiny, windows):
    hidden = tiny.embed(windows)
    before = tiny.head(hidden)
    assert torch.equal(tiny.head(hidden, quantized=True), before), "there is no int8 head yet"
    head = tiny.shell.get_output_embeddings()
    received: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: received.append(inputs[0]))
    tiny.head(hidden)
    hook.remove()
    tiny.quantize_head(ReferenceBackend())
    assert torch.equal(tiny.head(hidden), before), "full precision keeps its head"
    by_hand = Int8Linear.rounded(head, ReferenceBackend())
    step = by_hand.weight_scale[:, None]
    assert ((to_float(by_hand) - head.weight.float()).abs() <= 0.501 * step).all()
    assert torch.equal(tiny.head(hidden, quantized=True), by_hand(received[0]))


def test_an_assembled_model_has_the_int8_head_and_shares_the_rest(tiny, windows):
    full = assembled(tiny)
    tiny.quantize_head(ReferenceBackend())
    whole = assembled(tiny)
    assert whole.get_output_embeddings() is tiny.int8_head
    assert whole.get_input_embeddings() is full.get_input_embeddings(), "a tied table stays as it is"
    assert not isinstance(full.get_output_embeddings(), Int8Linear)
    assert not torch.equal(whole(windows[:1]).logits, full(windows[:1]).logits)


def test_its_size_is_counted_in_int8(tiny):
    full = assembled(tiny)
    head = full.get_output_embeddings().weight
    tied = head is full.get_input_embeddings().weight
    tiny.quantize_head(ReferenceBackend())
    whole = assembled(tiny)
    own = head.numel() + 4 * len(head)  # levels, and a float32 scale a row
    assert weight_bytes(whole) == weight_bytes(full) + own - (0 if tied else head.nbytes)
    assert parameter_count(whole) == parameter_count(full), "at full precision a tied table is held once"


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mixtral"])
def test_a_run_measures_and_writes_the_int8_head(model, tmp_path):
    settings = [*TINY, f"model={model}", "measure=[perplexity,memory]"]

    def metrics(name: str, *more: str) -> dict[str, float]:
        outcome = launch(*settings, *more, f"hydra.run.dir={tmp_path / name}")
        assert outcome.code == 0, outcome.err
        return json.loads((tmp_path / name / "results.json").read_text())["metrics"]

    plain = metrics("plain")
    quantized = metrics("int8", "quantizer.lm_head=true")
    for full in ("perplexity_fp.python_docs", "perplexity_smoothed_fp.python_docs", "memory.weights_fp16_bytes"):
        assert quantized[full] == plain[full]
    assert quantized["perplexity.python_docs"] != plain["perplexity.python_docs"]
    assert quantized["memory.weights_bytes"] != plain["memory.weights_bytes"]

    where = tmp_path / "checkpoint"
    written = metrics("written", "quantizer.lm_head=true", f"checkpoint.dir={where}")
    read = metrics("read", "quantizer=none", "model=quantized", f"model.path={where}")
    for name in ("perplexity.python_docs", "memory.weights_bytes", "memory.weights_fp16_bytes"):
        assert written[name] == read[name] == quantized[name]
    with pytest.raises(
        UserError, match=r"is quantised, which the export does not support\. .*quantizer\.lm_head=false"
    ):
        export(where, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_lm_head_accepts_only_booleans(tmp_path):
    outcome = launch(*TINY, "quantizer.lm_head=int8", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert "quantizer.lm_head: 'int8' is not valid" in outcome.err
