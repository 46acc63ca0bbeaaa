"""What a run needs is counted from the config, and a run that does not fit reports what would."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from typing import cast

import psutil
import pytest
import torch
from launching import TINY, launch
from transformers import AutoModelForCausalLM, MixtralConfig

from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.models.sources import HubModel, TinyModel
from haq_lab.pipeline import preflight

IDLE = Kernels(lambda launch: None, architecture=80, multiprocessors=4, shared_limit=64 * 1024)
EXPERT = 3 * 4096 * 14336  # parameters of one of Mixtral-8x7B's


def test_sizes_are_those_of_the_real_modules(tiny):
    size = preflight.measure_size(tiny.config)
    whole = AutoModelForCausalLM.from_pretrained(tiny.folder)
    assert size.total == sum(parameter.numel() for parameter in whole.parameters())
    assert size.depth == tiny.depth


def test_mixtral_8x7b_is_known_without_its_config():
    size = preflight.measure_size(MixtralConfig())
    assert size.total == pytest.approx(46.7e9, rel=0.001)  # the size that its authors publish
    assert (size.width, size.widest) == (4096, 14336)


def _mixtral(tmp_path, *more):
    return launch("+experiment=paper_mixtral", "tracking=none", f"hydra.run.dir={tmp_path}", *more)


def test_mixtral_without_hub_or_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100e9, 50e9, 50e9))
    outcome = _mixtral(tmp_path, "data.c4.windows=16")
    assert outcome.code == 2
    assert "46.7 billion parameters in 32 layers" in outcome.err
    assert re.search(r"the hub \(it does not answer\) .*DOES NOT FIT", outcome.err)
    assert re.search(r"disk at .*DOES NOT FIT", outcome.err)
    assert "python -m haq_lab +experiment=paper_mixtral tracking=none data.c4.windows=16 model=smol_moe" in outcome.err
    assert "model=tiny_mixtral" in outcome.err


@pytest.fixture
def local(tmp_path):
    """A folder with Mixtral-8x7B's config, two layers of it, and no weights."""
    folder = tmp_path / "mixtral"
    folder.mkdir()
    config = MixtralConfig(num_hidden_layers=2).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _lines(experiment, source):
    needs = preflight.list_needs(experiment, source, preflight.measure_size(source.config()))
    return {need.what.split()[0]: need for need in needs}


def test_a_local_folder_needs_no_hub(local, monkeypatch):
    from haq_lab.config.build import build
    from tests.config.test_build import _composed

    setting = ["+experiment=paper_mixtral", f"model.name={local}"]
    few = ["calibration.samples=1", "data.c4.windows=1", "data.wikitext2.windows=1"]
    experiment = build(_composed(*setting, *few))
    needs = _lines(experiment, experiment.model)
    assert {*needs} == {"memory", "GPU"}
    assert needs["memory"].needed > 4 * 1.45e9  # a layer in float32
    head = build(_composed(*setting, *few, "quantizer.lm_head=true"))
    assert _lines(head, experiment.model)["memory"].needed == needs["memory"].needed + 2 * 32000 * 4096 + 4096
    many = _lines(build(_composed(*setting)), experiment.model)
    assert many["disk"].needed > 10e9, "hidden states of all windows don't stay in memory"
    kept = build(_composed(*setting, *few, "measure=[perplexity,memory]"))
    assert _lines(kept, experiment.model)["memory"].needed == pytest.approx(
        needs["memory"].needed + 2 * 1.45e9, rel=0.01
    )
    compared = build(_composed(*setting, *few, "measure=[perplexity,latency]", "measure.latency.against=none"))
    total = preflight.measure_size(experiment.model.config()).total
    assert (
        _lines(compared, experiment.model)["memory"].needed
        == _lines(kept, experiment.model)["memory"].needed + 4 * total
    )


@pytest.mark.parametrize(("budget", "resident"), [("50%", 8), ("4", 4 + 4), ("1GB", 1e9 / EXPERT)])
def test_offloaded_experts_need_no_memory_but_their_budget(budget, resident, local):
    from haq_lab.config.build import build
    from tests.config.test_build import _composed

    setting = ["+experiment=paper_mixtral", f"model.name={local}", "measure=[memory]", "calibration.samples=1"]
    all_of_it = build(_composed(*setting))
    offloaded = build(_composed(*setting, "offload=haq", f"offload.budget='{budget}'"))
    spared = _lines(all_of_it, all_of_it.model)["memory"].needed - _lines(offloaded, offloaded.model)["memory"].needed
    assert spared == pytest.approx((2 * 8 - resident) * EXPERT, rel=0.01)


def _on_a_gpu(local, *more):
    """What a deployed model of two layers takes of RAM and of the GPU that computes it; of RAM if a CPU does."""
    from haq_lab.config.build import build
    from tests.config.test_build import _composed

    few = [f"model.name={local}", "measure=[memory]", "calibration.samples=1"]
    experiment = build(_composed("+experiment=paper_mixtral", *few, *more))
    by_gpu = replace(experiment, backend=CudaBackend("cpu", IDLE))
    both, ram_alone = _lines(by_gpu, experiment.model), _lines(experiment, experiment.model)
    assert ram_alone["GPU"].needed == 0
    return both["memory"].needed, both["GPU"].needed, ram_alone["memory"].needed


def test_the_free_memory_is_that_of_the_backends_gpu(local, monkeypatch):
    """With `backend.device=cuda:1 backend.share=true`, torch's current device is still GPU 0."""
    from haq_lab.config.build import build
    from tests.config.test_build import _composed

    free = {None: 1, torch.device("cuda", 1): 1234}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free[device], 9999))
    experiment = build(_composed("+experiment=paper_mixtral", f"model.name={local}"))
    backend = CudaBackend("cuda:1", IDLE, share=True)
    assert _lines(replace(experiment, backend=backend), experiment.model)["GPU"].there == 1234


@pytest.mark.parametrize(("budget", "resident"), [("50%", 8), ("4", 4 + 4), ("1GB", 1e9 / EXPERT)])
def test_beside_a_gpu_the_arena_is_its_memory_and_all_experts_lie_in_ram(budget, resident, local):
    bare, all_of_it, _ = _on_a_gpu(local)
    memory, gpu, _ = _on_a_gpu(local, "offload=haq", f"offload.budget='{budget}'")
    assert memory - bare == 2 * 8 * EXPERT, "page-locked, whatever the budget"
    assert all_of_it - gpu == pytest.approx((2 * 8 - resident) * EXPERT, rel=0.01)


@pytest.mark.parametrize(
    ("formats", "in_ram", "in_a_slot"),
    [
        (["offload.device_format=fp16"], 1, 2),
        (["quantizer=none", "offload.device_format=fp16"], 4, 2),
        (["quantizer=none", "offload.host_format=bf16"], 2, 2),
    ],
)
def test_experts_take_on_each_tier_what_their_format_says(formats, in_ram, in_a_slot, local):
    offloaded = ["offload=haq", "offload.budget=4"]
    as_made = 4 if "quantizer=none" in formats else 1
    memory, gpu, _ = _on_a_gpu(local, *offloaded, *formats[: len(formats) - 1])
    other_memory, other_gpu, _ = _on_a_gpu(local, *offloaded, *formats)
    assert other_memory - memory == 2 * 8 * (in_ram - as_made) * EXPERT
    assert other_gpu - gpu == (4 + 4) * (in_a_slot - as_made) * EXPERT


def test_what_is_deployed_on_a_gpu_is_in_its_memory_alone_if_it_is_quantised(local):
    """Else it waits in RAM for all layers to be there."""
    layer = preflight.measure_size(HubModel(str(local)).config()).layer
    shell = 2 * 2 * 32000 * 4096
    memory, gpu, ram_alone = _on_a_gpu(local)
    assert ram_alone - memory == 2 * layer
    assert gpu == pytest.approx(5 * layer + 2 * layer + shell, rel=0.001)
    memory, gpu, ram_alone = _on_a_gpu(local, "quantizer=none")
    assert ram_alone == memory
    assert gpu == pytest.approx(5 * layer + 4 * 2 * layer + shell, rel=0.001)
    assert _on_a_gpu(local, "quantizer=none", "offload=haq")[0] == memory, "experts are locked where they wait"


def test_a_full_precision_baseline_keeps_no_layer(local):
    from haq_lab.config.build import build
    from tests.config.test_build import _composed

    few = ["data.c4.windows=1", "data.wikitext2.windows=1"]
    experiment = build(_composed("+experiment=paper_mixtral", f"model.name={local}", "quantizer=none", *few))
    assert _lines(experiment, experiment.model)["memory"].needed < 2 * 4 * 1.45e9


def test_too_little_memory(local, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 4e9}))
    outcome = _mixtral(tmp_path, f"model.name={local}")
    assert outcome.code == 2
    assert re.search(r"memory .* 4\.0 GB there +DOES NOT FIT", outcome.err)


def test_small_models_pass_without_a_word(tmp_path):
    plain = [setting for setting in TINY if not setting.startswith("model")]
    folder = TinyModel("llama").folder()
    outcome = launch(*plain, "model=hf", f"model.name={folder}", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert "GB needed" not in outcome.out
    assert HubModel("no-such/model").config() is None
    assert not torch.is_grad_enabled()


def test_the_hessians_are_counted(local):
    """GPTQ holds a budget of Hessians and four square matrices of the widest input; RTN holds none."""
    from haq_lab.calibration.calibrator import HESSIAN_BYTES
    from haq_lab.config.build import build
    from tests.config.test_build import _composed

    few = [f"model.name={local}", "measure=[perplexity]", "data.c4.windows=1", "data.wikitext2.windows=1"]
    few += ["calibration.samples=1", "calibration.seqlen=8"]
    needed = {}
    for quantizer in ("rtn", "gptq"):
        experiment = build(_composed("+experiment=paper_mixtral", *few, f"quantizer={quantizer}"))
        needed[quantizer] = _lines(experiment, cast(HubModel, experiment.model))["memory"].needed
    calibration = 4 * 4096 * 8  # hidden states of the calibration tokens
    assert needed["gptq"] - needed["rtn"] == pytest.approx(4 * 4 * 14336**2 + HESSIAN_BYTES + calibration)
