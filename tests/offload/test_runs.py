"""`offload=...` in a run, and the commands beside it, on a tiny model."""

from __future__ import annotations

import json

import pytest
from launching import launch
from two_tiers import ON_A_GPU, SeparateMemoryStreams

from haq_lab.cli.offload import main
from haq_lab.routing.trace import Trace

SMALL = ["model=tiny_mixtral", "tracking=none", "measure=[memory,latency]", "measure.latency.prompt_tokens=8"]
SMALL += ["measure.latency.decode_tokens=4", "measure.latency.seconds=0", "measure.latency.iterations=1"]
ON_CUDA = ["backend=cuda", "backend.share=true"]
SMALL += ["calibration.samples=4", "calibration.seqlen=64"]
AUTO = ["quantizer=haq", "quantizer.weight_bits=auto", "quantizer.bits=6", "quantizer.group=32"]


@pytest.mark.parametrize(
    "options",
    [
        ["quantizer=rtn", "offload=lru"],
        ["quantizer=rtn", "offload=lru", "offload.device_format=fp16"],
        [*AUTO, "offload=lru", "offload.budget=6", "offload.spare=2"],
        ["quantizer=none", "offload=static"],
        ["quantizer=none", "offload=static", "offload.host_format=bf16", "offload.device_format=fp16"],
        pytest.param(["quantizer=rtn", "offload=lru", *ON_CUDA], marks=ON_A_GPU),
        pytest.param(["quantizer=rtn", "offload=fiddler", *ON_CUDA], marks=ON_A_GPU),
        pytest.param(["quantizer=rtn", "offload=lru", "offload.device_format=fp16", *ON_CUDA], marks=ON_A_GPU),
        pytest.param(["quantizer=none", "offload=static", *ON_CUDA], marks=ON_A_GPU),
    ],
)
def test_a_run_reports_what_its_engine_did(tmp_path, options):
    done = launch(*SMALL, *options, f"hydra.run.dir={tmp_path}")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert 0 < metrics["offload.hit_rate_pairs"] < 1
    assert metrics["offload.bytes_moved"] > 0
    assert (tmp_path / "offload.csv").read_text().startswith("layer,resident,hits,misses")
    assert not (tmp_path / "experts.bin").exists()


def test_a_run_on_a_gpu_keeps_its_experts_in_locked_memory(tmp_path, monkeypatch):
    streams = SeparateMemoryStreams("cpu")
    monkeypatch.setattr("haq_lab.pipeline.assemble.make_streams", lambda device: streams)
    done = launch(*SMALL, "quantizer=rtn", "offload=lru", f"hydra.run.dir={tmp_path}")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    slots = metrics["offload.slots"]
    moved = metrics["offload.bytes_moved"] / (metrics["offload.fast_tier_bytes"] / (slots + 4))
    assert moved == int(moved), "whole experts"
    assert 0 < moved < streams.copies - slots, "neither the first residents nor the warm-up count"
    assert streams.locked == []


def test_the_counts_do_not_depend_on_how_long_latency_is_measured(tmp_path):
    metrics = []
    for seconds in (0, 0.5):
        folder = tmp_path / str(seconds)
        done = launch(
            *SMALL,
            "quantizer=rtn",
            "offload=lru",
            "offload.prefetch=none",
            f"measure.latency.seconds={seconds}",
            f"hydra.run.dir={folder}",
        )
        assert done.code == 0, done.err
        record = json.loads((folder / "results.json").read_text())
        metrics.append(
            {
                name: value
                for name, value in record["metrics"].items()
                if name.startswith("offload.") and "waited" not in name
            }
        )
        samples = (folder / "latency.csv").read_text().count("prefill")
    assert metrics[0] == metrics[1]
    assert metrics[0]["offload.tokens"] == 8 + 4, "one prompt and its decoded tokens, without the warm-up"
    assert metrics[0]["offload.bytes_moved_per_token"] == metrics[0]["offload.bytes_moved"] / 12
    assert samples > 1


def test_hardware_is_what_the_predictor_decides_for_and_what_is_simulated(tmp_path):
    done = launch(*SMALL, "quantizer=rtn", "offload=fiddler", "hardware=rtx3060_12g", f"hydra.run.dir={tmp_path}")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["run"]["hardware"] == "rtx3060_12g"
    assert record["metrics"]["simulated.rtx3060_12g.latency.decode_ms_per_token.mean"] > 0


def test_a_sweep_over_options_takes_settings_that_one_of_them_has_no_use_for(tmp_path):
    settings = ["quantizer=none", "offload=none,static", "offload.budget=75%"]
    done = launch("-m", *SMALL, *settings, f"hydra.sweep.dir={tmp_path}")
    assert done.code == 0, done.err
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")]
    by_option = {record["run"]["offload"]: record["config"]["offload"] for record in records}
    assert by_option["none"] == {"_target_": None}
    assert by_option["static"]["budget"] == "75%"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model=tiny_llama", "offload=haq"], "has no experts"),
        (["offload=lru", "offload.budget=1%"], "no slot"),
        (["offload=lru", "offload.budget=0"], "offload.budget: '0' leaves no slot"),
        (["offload=lru", "offload.profile=no.trace"], "offload.profile: trace: there is no file 'no.trace'"),
        (
            ["quantizer=rtn", "offload=lru", "offload.host_format=bf16"],
            "'bf16' does not work with quantised",
        ),
        (
            ["offload=fiddler", "offload.device_format=fp16"],
            "offload.on_miss: 'predict' does not work with offload.device_format=fp16",
        ),
        (["offload=lru", "offload.device_format=fp8"], "offload.device_format: 'fp8' is not one of int8, fp16"),
        (["offload=lru", "hardware=rtx3060"], "hardware: 'rtx3060' is not one of a100_80g"),
        (["hardware=rtx3060_12g"], "has no effect because offload=none. Choose offload=haq or hardware=none."),
        (
            ["offload.budget=40%"],
            "offload.budget has no effect because offload=none. Choose offload=OPTION, where OPTION is one of all_gpu,",
        ),
        (["offload=none", "offload.budget=40%"], "offload.budget has no effect because offload=none."),
        (
            ["quantizer=none", "quantizer.lm_head=true"],
            "quantizer.lm_head has no effect because quantizer=none. Choose quantizer=",
        ),
        (["++offload.budget=40%"], "offload.budget has no effect because offload=none. Choose offload=OPTION, where"),
        (
            ["++quantizer.dampening=0.1"],
            "quantizer.dampening: there is no such setting (did you mean 'dampening_frac'?)",
        ),
        (["offload=none", "offload.bugdet=40%"], "offload.bugdet: there is no such setting in the options chosen (did"),
    ],
)
def test_mistakes_end_with_code_2(tmp_path, options, message):
    quantizer = [] if any(option.startswith("quantizer=") for option in options) else ["quantizer=none"]
    done = launch(*SMALL, *quantizer, *options, f"hydra.run.dir={tmp_path}")
    assert done.code == 2
    assert message in done.err


def test_trace_and_its_mistakes(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play. " * 40)
    arguments = ["--windows", "2", "--seqlen", "64", "--prompt", "16", "--out", str(tmp_path / "a.trace")]
    main(["trace", "tiny_mixtral", str(text), *arguments])
    trace = Trace.open(tmp_path / "a.trace")
    assert (trace.tokens, trace.layers, int(trace.decode.sum())) == (128, 2, 96)
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "tiny_mixtrl", str(text), *arguments])
    assert stopped.value.code == 2
    assert "did you mean 'tiny_mixtral'" in capsys.readouterr().err


def test_a_quantised_checkpoint_can_be_traced(tmp_path):
    checkpoint = tmp_path / "quantized"
    small = ["model=tiny_mixtral", "quantizer=rtn", "measure=[]", "data=[]", "tracking=none"]
    done = launch(*small, f"checkpoint.dir={checkpoint}", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    text = tmp_path / "text.txt"
    text.write_text("All work and no play. " * 40)
    arguments = ["--windows=1", "--seqlen=64", f"--out={tmp_path / 'a.trace'}", "--set", f"model.path={checkpoint}"]
    main(["trace", "quantized", str(text), *arguments])
    trace = Trace.open(tmp_path / "a.trace")
    assert (trace.tokens, trace.layers, trace.expert_count) == (64, 2, 8)
    main(["trace", str(checkpoint), str(text), *arguments[:2], f"--out={tmp_path / 'b.trace'}"])
    assert (Trace.open(tmp_path / "b.trace").experts == trace.experts).all()


def test_a_run_records_that_haq_ignores_paths(tmp_path, monkeypatch):
    monkeypatch.setattr("haq_lab.offload.policies.path_model.MAX_PATH_EXPERTS", 15)
    monkeypatch.setattr("haq_lab.offload.policies.path_model.STEPS", 5)
    done = launch(*SMALL, "quantizer=rtn", "offload=haq", "offload.budget=75%", f"hydra.run.dir={tmp_path}")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "results.json").read_text())
    assert "ignores the path of a token, because the model has 16 experts" in record["run"]["offload_limitation"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert any("ignores the path" in event.get("text", "") for event in events if event["event"] == "notice")
