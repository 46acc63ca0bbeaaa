"""transformers loads checkpoints after `import haq_lab.hf`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from launching import TINY, launch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import haq_lab
from haq_lab.config.backends import make_backend
from haq_lab.hf import QUANTIZERS  # the import registers the method
from haq_lab.hf.quantizer import HaqLabConfig, HaqLabQuantizer
from haq_lab.pipeline.deployment import load_checkpoint
from haq_lab.utils.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a tiny Llama."""
    return _write("llama", tmp_path_factory.mktemp("llama"))


def _write(architecture: str, folder: Path) -> Path:
    where = [f"checkpoint.dir={folder / 'checkpoint'}", f"hydra.run.dir={folder / 'run'}"]
    outcome = launch(*TINY, f"model=tiny_{architecture}", *where)
    assert outcome.code == 0, outcome.err
    return folder / "checkpoint"


@pytest.mark.parametrize("order", [("haq_lab.hf", QUANTIZERS), (QUANTIZERS, "haq_lab.hf")])
def test_the_method_is_registered_in_any_order_of_imports(order):
    checks = [
        "import importlib, sys",
        "import haq_lab.hf" if order[0] == "haq_lab.hf" else "",
        "assert not {'torch', 'transformers'} & {*sys.modules}",
        *(f"importlib.import_module('{name}')" for name in order),
        f"auto = sys.modules['{QUANTIZERS}']",
        "assert auto.AUTO_QUANTIZER_MAPPING['haq_lab'].__name__ == 'HaqLabQuantizer'",
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['haq_lab'].__name__ == 'HaqLabConfig'",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(checks)], check=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_equal_those_of_our_loader(architecture, backend, windows, tmp_path):
    folder = _write(architecture, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["backend"] = backend
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config)
    ours, _ = load_checkpoint(folder, make_backend(backend))
    assert torch.equal(theirs(windows).logits, ours(windows).logits)
    assert theirs.config is theirs.base_model.config
    assert theirs.is_quantized


def test_greedy_text_is_the_same_everywhere(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("The quick brown fox", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generate("The quick brown fox", max_new_tokens=8, max_length=None, do_sample=False)[0]["generated_text"]
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)
    beams = model.generate(**prompt, max_new_tokens=8, num_beams=2, do_sample=False)
    assert beams.shape == (1, prompt["input_ids"].shape[1] + 8)


def test_a_damaged_tensor_is_refused(checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    shard = copy / "layer-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"layer-00000\.safetensors"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_a_device_map_chooses_the_backend(checkpoint, device):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device)
    assert model.device == torch.device("cpu")


def test_a_split_device_map_is_refused(checkpoint):
    with pytest.raises(UserError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(checkpoint, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("device", [1, "cuda:1", {"": 1}])
def test_a_device_map_can_name_a_gpu(device):
    quantizer = HaqLabQuantizer(HaqLabConfig())
    quantizer.update_device_map(device)
    with patch("haq_lab.config.backends.make_backend") as make:
        quantizer._make_backend(None)
    make.assert_called_once_with("cuda", device="cuda:1")


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # the harness passes its own on
def test_the_harness_loads_a_checkpoint(checkpoint):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    requests = [instance("loglikelihood", {}, ("The quick", f" {word}"), 0) for word in ("brown fox", "lazy dog", "a")]
    harness = huggingface.HFLM(pretrained=str(checkpoint), device="cpu", batch_size=3)
    scores = harness.loglikelihood(requests, disable_tqdm=True)
    model, tokenizer = haq_lab.load(checkpoint)
    for request, (score, _) in zip(requests, scores, strict=True):
        skipped = len(tokenizer("The quick").input_ids) - 1
        tokens = tokenizer("".join(request.args), return_tensors="pt").input_ids
        losses = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
        assert score == pytest.approx(losses[skipped:].sum().item(), rel=1e-5)


def test_saving_is_refused(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="haq_lab and is not serializable"):
        model.save_pretrained(tmp_path)


def test_the_index_names_every_tensor(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert index["weight_map"] == {name: shard["file"] for shard in manifest["shards"] for name in shard["tensors"]}
