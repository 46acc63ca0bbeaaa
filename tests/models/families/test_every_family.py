"""Every row of the family table, on a tiny random model: what a user can do with one, he can do with all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import TINY as QUICK
from launching import launch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import haq_lab.hf  # noqa: F401  # registers the checkpoints with transformers
from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.checkpoint.export.engines import export
from haq_lab.checkpoint.manifest import layer_file
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.measure.perplexity import score_windows, summary
from haq_lab.models.families.lookup import FAMILIES
from haq_lab.models.families.tiny import TINY, tiny_fields
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.deployment import load_checkpoint
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.prefix.contents import Prefix
from haq_lab.quantizers.base import Quantizer
from haq_lab.quantizers.gptq import GPTQ
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.quantizers.smoothquant import SmoothQuant
from haq_lab.runtime.deploy import deploy
from haq_lab.runtime.native_decoder import NativeStack, Passed
from haq_lab.utils.errors import UserError
from tests.models.test_layerwise import whole_of
from tests.quantizers.test_rotation import Unrounded, UnroundedBackend, rotated_layers
from tests.quantizers.test_smoothing import relative, smoothed_layers

every_row = pytest.mark.parametrize("architecture", sorted(TINY))
QUANTIZERS = {"rtn": RTN(), "smoothquant": SmoothQuant(), "gptq": GPTQ(), "haq": HAQ(sensitivity=2)}


@pytest.fixture
def folder(architecture) -> Path:
    return TinyModel(architecture).folder()


@pytest.fixture
def model(folder) -> LayeredModel:
    return LayeredModel(folder)


def _float_layers(model):
    return [model.load_layer(index) for index in range(model.depth)]


def test_every_row_has_a_tiny_config():
    assert set(TINY) == {family.model_type for family in FAMILIES}


@every_row
def test_layer_by_layer_equals_transformers(model, windows, logits_of):
    layers, expected = _float_layers(model), whole_of(model.folder)(windows).logits
    torch.testing.assert_close(logits_of(model, layers, windows), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.assemble(layers)(windows).logits, expected, rtol=1e-5, atol=1e-4)


@every_row
def test_smoothing_preserves_the_function(model, windows, logits_of):
    before = logits_of(model, _float_layers(model), windows)
    layers, folded = smoothed_layers(model, ("norm", "value", "up"))
    groups = [group for index in range(model.depth) for group in model.groups_of(index)]
    assert folded == sum(group.source is not None for group in groups) > 0
    assert relative(logits_of(model, layers, windows) - before, before) < 1e-4


@every_row
def test_rotation_preserves_the_function(model, windows, logits_of):
    before = logits_of(model, _float_layers(model), windows)
    layers = rotated_layers(model, Unrounded("block", 16), UnroundedBackend())
    linears = [module for layer in layers for module in layer.modules() if isinstance(module, Int8Linear)]
    assert {linear.rotation for linear in linears} == {16}
    assert relative(logits_of(model, layers, windows) - before, before) < 1e-4


@every_row
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers(model, windows, logits_of, quantizer):
    """All linears of the layers are quantised, and the model still predicts nearly the same."""
    layers: list[nn.Module] = []
    inputs = PassInputs(
        model, QUANTIZERS[quantizer], ReferenceBackend(), windows.flip(0), CalibrationPolicy(), {"text": windows}
    )
    result = sequential_pass(inputs, lambda index, layer: layers.append(layer))
    groups = [group for index in range(model.depth) for group in model.groups_of(index)]
    floats = {name for layer in layers for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert floats <= {name for group in groups for name in group.float_consumers} | {*model.family.in_float}
    names = [name for group in groups for name in group.consumers]
    assert sorted(report.linear for report in result.reports) == sorted(names)
    hidden = result.hidden["text"]
    logits = {level: model.head(states).log_softmax(-1) for level, states in hidden.items()}
    assert relative(hidden["smoothed"] - hidden["fp"], hidden["fp"]) < 1e-3
    divergence = float(F.kl_div(logits["quantized"], logits["fp"], reduction="batchmean", log_target=True))
    bits = logits["fp"].shape[1] * (logits["fp"].exp() * logits["fp"]).sum(-1).mean()
    assert divergence / float(-bits) < 0.2


def _perplexity(folder: Path, windows: Tensor) -> float:
    """The perplexity of a checkpoint by transformers alone."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [F.cross_entropy(whole(window[None]).logits[0, :-1], window[1:]) for window in windows]
    return math.exp(float(torch.stack(losses).mean()))


def _metrics(model: LayeredModel, quantizer: Quantizer | None, windows: Tensor, writer=None) -> dict[str, float]:
    """The perplexities of a pass over the windows."""
    inputs = PassInputs(model, quantizer, ReferenceBackend(), windows.flip(0), CalibrationPolicy(), {"text": windows})
    result = sequential_pass(inputs, lambda *_: None, writer)
    return summary(*score_windows(model, windows, result.hidden["text"]), "text")


@every_row
def test_perplexity_equals_that_of_transformers(model, windows):
    metrics, expected = _metrics(model, SmoothQuant(), windows), _perplexity(model.folder, windows)
    assert metrics["perplexity_fp.text"] == pytest.approx(expected, rel=1e-5)
    assert metrics["perplexity_smoothed_fp.text"] == pytest.approx(expected, rel=1e-4)


def test_the_command_runs_any_row(tmp_path):
    outcome = launch(*QUICK, "model=tiny", "model.architecture=gemma2", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    outcome = launch(*QUICK, "model=tiny", "model.architecture=gema2", f"hydra.run.dir={tmp_path / 'other'}")
    assert (outcome.code, "did you mean 'gemma2'" in outcome.err) == (2, True)


def _write(folder: Path, model: LayeredModel, quantizer: Quantizer, windows: Tensor) -> None:
    writer = CheckpointWriter(folder, model, {}, {}, force=False)
    _metrics(model, quantizer, windows, writer)
    writer.finish()
    writer.close()


@every_row
def test_the_checkpoint_loads_everywhere(model, windows, logits_of, tmp_path):
    """By layers, as a whole, and by transformers: the same bits. The whole model also generates with a cache."""
    folder = tmp_path / "checkpoint"
    _write(folder, model, HAQ(sensitivity=2), windows)
    model = QuantizedModel(folder, ReferenceBackend())
    ours, _ = load_checkpoint(folder, ReferenceBackend())
    expected = ours(windows).logits
    torch.testing.assert_close(
        logits_of(model, [model.load_layer(index) for index in range(model.depth)], windows), expected
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    native, _ = load_checkpoint(folder, CpuBackend())
    assert torch.equal(theirs(windows).logits, native(windows).logits)
    prompt = AutoTokenizer.from_pretrained(folder)("for x in range(10):", return_tensors="pt")
    text = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(text, native.generate(**prompt, max_new_tokens=12, do_sample=False))
    assert text.shape[1] > prompt["input_ids"].shape[1]


@every_row
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_export(model, windows, tmp_path):
    """Without our code: no tensor is missing or unexpected, and the static scales give nearly our logits."""
    pytest.importorskip("compressed_tensors")
    _write(tmp_path / "checkpoint", model, HAQ(activations="static", rotation="none", sensitivity=0), windows)
    export(tmp_path / "checkpoint", tmp_path / "export")
    theirs, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    ours, _ = load_checkpoint(tmp_path / "checkpoint", ReferenceBackend())
    assert relative(theirs(windows).logits, ours(windows).logits) > 0
    assert relative(theirs(windows).logits - ours(windows).logits, ours(windows).logits) < (
        0.5 if model.experts else 0.1
    )


@every_row
def test_a_killed_pass_resumes(model, windows, tmp_path):
    """The second pass begins after the layer that the first one finished, and writes the same checkpoint."""

    class Killed(Exception):
        pass

    def write(folder: Path, dies: bool) -> int:
        writer = CheckpointWriter(folder, model, {}, {}, force=False)
        inputs = PassInputs(model, SmoothQuant(), ReferenceBackend(), windows, CalibrationPolicy(), {})
        done: list[int] = []

        def on_layer(index: int, layer: nn.Module) -> None:
            done.append(index)
            if dies:
                raise Killed

        try:
            sequential_pass(inputs, on_layer, writer)
            writer.finish()
            writer.close()
        except Killed:
            writer.release()
        return len(done)

    assert write(tmp_path / "killed", dies=True) == 1
    assert write(tmp_path / "killed", dies=False) == model.depth - 1
    assert write(tmp_path / "whole", dies=False) == model.depth
    for index in range(model.depth):
        name = layer_file(index)
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Configs that differ from the tiny ones: model type, further fields, and the type of the file.
ODD = {
    "one_key_value_head": ("qwen2", {"num_key_value_heads": 1}, torch.float32),
    "untied": ("qwen2", {"tie_word_embeddings": False}, torch.float32),
    "tied": ("qwen3", {"tie_word_embeddings": True}, torch.float32),
    "narrow_heads": ("llama", {"head_dim": 8}, torch.float32),
    "vocabulary": ("olmo2", {"vocab_size": 331}, torch.float32),
    "float16": ("qwen3", {}, torch.float16),
    "bfloat16": ("gemma3_text", {}, torch.bfloat16),
    "bfloat16_untied": ("gemma2", {"tie_word_embeddings": False}, torch.bfloat16),
    "linear_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        torch.float32,
    ),
    "dynamic_rope": (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 32},
        torch.float32,
    ),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            }
        },
        torch.float32,
    ),
    "llama3_rope": (
        "smollm3",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            }
        },
        torch.float32,
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.5 * i for i in range(8)],
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            },
            "original_max_position_embeddings": 32,
        },
        torch.float32,
    ),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, torch.float32),
    "window_of_all_layers": ("phi3", {"sliding_window": 8}, torch.float32),
    "short_window": ("gemma3_text", {"sliding_window": 8}, torch.float32),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_configs_equal_transformers(name, windows, tmp_path):
    architecture, changes, dtype = ODD[name]
    config = AutoConfig.for_model(architecture, **tiny_fields(architecture, 2, 64) | changes)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path)
    metrics = _metrics(LayeredModel(tmp_path), None, windows)
    assert metrics["perplexity.text"] == pytest.approx(_perplexity(tmp_path, windows), rel=1e-5)


# Rows whose layers the native CPU decoder computes. The others have latent attention, no attention,
# or normalised values.
NATIVE = set(TINY) - {"lfm2_moe", "qwen3_next", "gemma4_text"}
NATIVE -= {"qwen3_5_moe_text", "deepseek_v2", "deepseek_v3"}


@every_row
def test_native_layers_compute_the_same(model, architecture, caplog):
    """A prompt longer than the sliding window, and a step after it; alone, and in a batch padded on the left."""
    layers: list[nn.Module] = []
    inputs = PassInputs(model, RTN(), CpuBackend(), None, CalibrationPolicy(), {})
    sequential_pass(inputs, lambda index, layer: layers.append(layer))
    lines: list[str] = []
    plain, whole = model.assemble(layers), deploy(model.assemble(layers), model, CpuBackend(), lines.append)
    assert (lines == []) == (architecture in NATIVE), lines
    ids = torch.randint(1, 257, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in (
        {"input_ids": ids[1:]},
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
    ):
        outputs = []
        for one in (plain, whole):
            first = one(**given, use_cache=True)
            after = {"input_ids": ids[: len(first.logits), :1], "cache": first.cache, "use_cache": True}
            if "attention_mask" in given:
                more = {"attention_mask": F.pad(mask, (0, 1), value=1), "position_ids": positions[:, -1:] + 1}
                after |= more
            outputs.append(torch.cat([first.logits, one(**after).logits], dim=1))
        outputs = [logits[:, 9:] for logits in outputs]
        errors = (outputs[1] - outputs[0]).norm(dim=-1) / outputs[0].norm(dim=-1)
        assert errors.median() < 0.01
    assert not [record for record in caplog.records if "native decoder not used" in record.getMessage()]


def test_native_stacks_get_the_arguments_of_their_kind(windows, tmp_path):
    """Two layers with a window and two without, whose rotary positions differ too."""
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 2
    fields = tiny_fields("gemma3_text", 4, 64) | {"layer_types": kinds, "sliding_window": 8}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **fields)).save_pretrained(tmp_path)
    model, layers = LayeredModel(tmp_path), []
    inputs = PassInputs(model, RTN(), CpuBackend(), None, CalibrationPolicy(), {})
    sequential_pass(inputs, lambda index, layer: layers.append(layer))
    plain, whole = model.assemble(layers), deploy(model.assemble(layers), model, CpuBackend())
    assert [type(module) for module in whole.model.layers] == [NativeStack, Passed] * 2
    wanted, got = plain(windows).logits, whole(windows).logits
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.01
    first = whole(windows[:, :30], use_cache=True)
    rest = torch.cat([whole(windows[:, [at]], cache=first.cache, use_cache=True).logits for at in range(30, 34)], dim=1)
    assert ((rest - wanted[:, 30:34]).norm(dim=-1) / wanted[:, 30:34].norm(dim=-1)).median() < 0.01


def test_positions_may_rotate_a_part_of_each_head(windows, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}  # of Phi-4-mini
    fields = tiny_fields("phi3", 2, 64) | {"rope_parameters": rope}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **fields)).save_pretrained(tmp_path)
    model, layers = LayeredModel(tmp_path), []
    inputs = PassInputs(model, RTN(), CpuBackend(), None, CalibrationPolicy(), {})
    sequential_pass(inputs, lambda index, layer: layers.append(layer))
    plain, whole = model.assemble(layers), deploy(model.assemble(layers), model, CpuBackend())
    assert [type(module) for module in whole.model.layers] == [NativeStack]
    wanted, first = plain(windows).logits, whole(windows[:, :30], use_cache=True)
    rest = whole(windows[:, 30:], cache=first.cache, use_cache=True).logits
    got = torch.cat([first.logits, rest], dim=1)
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.01


def test_padding_after_a_prompt_behind_a_window_is_not_native(caplog):
    model = LayeredModel(TinyModel("mistral").folder())
    layers: list[nn.Module] = []
    inputs = PassInputs(model, RTN(), CpuBackend(), None, CalibrationPolicy(), {})
    sequential_pass(inputs, lambda index, layer: layers.append(layer))
    plain, whole = model.assemble(layers), deploy(model.assemble(layers), model, CpuBackend())
    ids, mask = torch.randint(1, 257, (1, 40)), torch.ones(1, 40, dtype=torch.long)
    mask[:, 30:34] = 0
    wanted, got = plain(ids, attention_mask=mask).logits, whole(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[:, 34:], wanted[:, 34:], rtol=1e-4, atol=1e-4)
    assert "padding follows tokens, and there is a sliding window" in caplog.text


def test_soft_caps_take_no_prefix():
    model = LayeredModel(TinyModel("gemma2").folder())
    with pytest.raises(UserError, match=r"quantizer\.prefix: 'gemma2' has eager attention, which takes no prefix"):
        model.with_prefix(Prefix((1,), "a", None))
