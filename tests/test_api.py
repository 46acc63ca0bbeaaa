"""The public API: each call does what the command line does."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from launching import TINY, launch

import haq_lab
from haq_lab.utils.errors import UserError

CALIBRATION = {"calibration.samples": 4, "calibration.seqlen": 64}
SHORT = ["data.python_docs.seqlen=64", "data.python_docs.windows=2", "backend=reference"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return haq_lab.quantize("tiny_llama", "rtn", out=tmp_path_factory.mktemp("api") / "it's a, [folder]")


def test_import_loads_no_torch():
    code = (
        "import sys, haq_lab; haq_lab.results; assert not {'torch', 'pandas', 'numpy'} & set(sys.modules); "
        "print(haq_lab.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == haq_lab.__version__


def test_all_names_exist():
    assert all(hasattr(haq_lab, name) for name in haq_lab.__all__)
    with pytest.raises(AttributeError, match="quantise"):
        haq_lab.quantise  # noqa: B018


def test_quantize_then_load_then_generate(checkpoint):
    model, tokenizer = haq_lab.load(checkpoint, backend="reference")
    prompt = tokenizer("The quick brown fox", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**prompt).logits).all()
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 3


def test_evaluate_equals_the_command_line(checkpoint, tmp_path):
    table = haq_lab.evaluate(checkpoint, ["python_docs"], *SHORT)
    assert launch(*TINY, f"hydra.run.dir={tmp_path / 'run'}").code == 0
    run = haq_lab.load_results(tmp_path).iloc[0]
    expected = pd.DataFrame({"data": ["python_docs"], "perplexity": [run["perplexity.python_docs"]]})
    pd.testing.assert_frame_equal(table, expected)


def test_run_is_the_command_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics, folder = haq_lab.run(*TINY)
    assert launch(*TINY).out.startswith("already finished")
    assert metrics["perplexity.python_docs"] > 1
    assert folder.parent.name == "runs"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: haq_lab.load(folder / "none"), "there is no folder"),
        (lambda folder: haq_lab.quantize("smoll", out=folder / "out"), "'smoll' is no option, .*'smol'"),
        (lambda folder: haq_lab.load(folder, backend="gpu"), "backend: 'gpu'"),
        (lambda folder: haq_lab.load_results(folder / "none"), "there is no folder"),
        (lambda folder: haq_lab.quantize("tiny_llama", "rtn", out=folder / "out", weight_bits=7), "weight_bits"),
    ],
)
def test_a_mistake_is_one_message(call, message, tmp_path):
    with pytest.raises(UserError, match=message):
        call(tmp_path)
