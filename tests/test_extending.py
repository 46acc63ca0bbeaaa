"""The diffs of docs/extending.md apply to this very code, and what they add runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import TINY

ROOT = Path(__file__).parent.parent
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the project without what it does not need to run."""
    for name in ("haq_lab", "conf", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def _extended(folder: Path, number: int, *overrides: str, project: Path | None = None, tiny: list[str] = TINY) -> dict:
    """Apply a diff in `folder`, run there what it adds, in a process of its own, and return the results.

    Args:
        project: Where the code is; `folder` itself where the diff changes it.
        tiny: Settings of a small run, before `overrides`.
    """
    subprocess.run(["git", "apply", "-p1", "-"], input=DIFFS[number], text=True, cwd=folder, check=True)
    command = [sys.executable, "-m", "haq_lab", *tiny, *overrides, f"hydra.run.dir={folder / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(project or folder)}
    told = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return json.loads((folder / "run" / "results.json").read_text())


def test_there_is_a_short_diff_for_each():
    assert [len(re.findall(r"^[+-](?![+-])", diff, flags=re.MULTILINE)) < 60 for diff in DIFFS] == [True] * 6


def test_a_quantizer(tmp_path):
    """In a file of the user's own, in an empty folder; the project stays as it is."""
    target = ["quantizer._target_=power_of_two.PowerOfTwo", "+quantizer.round_up=false"]
    metrics = _extended(tmp_path, 0, *target, project=ROOT)["metrics"]
    assert metrics["perplexity.python_docs"] != metrics["perplexity_fp.python_docs"]


@pytest.mark.slow
def test_a_family(copied, cache):
    from transformers import AutoModelForCausalLM, Ernie4_5Config

    from haq_lab.models.random_tiny import byte_tokenizer

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Ernie4_5Config(**shape, num_key_value_heads=2, vocab_size=257, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(copied / "ernie")
    byte_tokenizer().save_pretrained(copied / "ernie")
    model = ["model=hf", f"model.name={copied / 'ernie'}", "quantizer=smoothquant"]
    metrics = _extended(copied, 1, *model)["metrics"]
    smoothed, fp = metrics["perplexity_smoothed_fp.python_docs"], metrics["perplexity_fp.python_docs"]
    assert smoothed == pytest.approx(fp, rel=1e-4)


@pytest.mark.slow
def test_a_policy(copied):
    offload = [
        "model=tiny_mixtral",
        "offload=lru",
        "offload.eviction=fading",
        "offload.budget=75%",
        "offload.prefetch=none",
    ]
    quick = ["measure=[latency]", "measure.latency.seconds=0", "measure.latency.prompt_tokens=8"]
    metrics = _extended(copied, 2, *offload, *quick, "measure.latency.decode_tokens=4")["metrics"]
    assert 0 < metrics["offload.hit_rate_pairs"] < 1


@pytest.mark.slow
def test_a_tracker(tmp_path):
    """In a file of the user's own, beside a tracker that is an option."""
    log = ["+tracking.log._target_=metrics_log.MetricsLog", f"+tracking.log.path={tmp_path / 'metrics.jsonl'}"]
    results = _extended(tmp_path, 3, "tracking=[offline]", *log, project=ROOT)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line.items() >= results["metrics"].items()
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_a_metric(tmp_path):
    """In a file of the user's own, beside the measures that are options."""
    top = ["+measure.top._target_=top_agreement.TopAgreement", "+measure.top.k=3"]
    results = _extended(tmp_path, 4, *top, project=ROOT)
    metrics = results["metrics"]
    assert metrics["token_agreement.python_docs"] <= metrics["top3_agreement.python_docs"] <= 1
    assert results["run"]["own_metrics"]["top*_agreement.*"]["unit"] == "%"


@pytest.mark.slow
def test_a_dataset(tmp_path):
    """In a file of the user's own, for evaluation and for calibration."""
    code = ["data=[]", "+data.code._target_=stdlib_code.Stdlib", "+data.code.windows=2", "+data.code.seqlen=64"]
    settings = [one for one in TINY if not one.startswith("data.")]
    results = _extended(
        tmp_path, 5, *code, "quantizer=gptq", "calibration=text", "calibration.text=stdlib", project=ROOT, tiny=settings
    )
    assert results["metrics"]["perplexity.code"] != results["metrics"]["perplexity_fp.code"]
    assert results["protocol"]["calibration"]["source"] == "Python's standard library"
