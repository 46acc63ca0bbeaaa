"""Run folders as one table: finished, failed and unfinished ones."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from haq_lab.cli.results import main
from haq_lab.results import load as results
from haq_lab.results.show_run import show_results
from haq_lab.tracking.run_folder import RunFolder, read_results


@pytest.fixture
def runs(tmp_path):
    """One run of each kind, and an archived one that is not listed."""
    for quantizer, perplexity in (("rtn", 31.0), ("haq", 30.1)):
        folder = RunFolder(tmp_path / quantizer, {"quantizer": {"weight_bits": 8}})
        overrides = ["model=m", f"quantizer={quantizer}"]
        facts = {"model": "m", "quantizer": quantizer, "overrides": overrides, "sweep": "runs/sweep"}
        for _ in range(2):
            folder.begin("a: 1\n")
            metrics = {"perplexity.text": perplexity, "perplexity_fp.text": 30.0, "memory.weights_bytes": 1e6}
            folder.finish(facts, {}, metrics)
    failed = RunFolder(tmp_path / "deep" / "bad", {})
    failed.begin("a: 1\n")
    failed.fail({"model": "m", "overrides": ["model=m", "quantizer=bad"]}, ValueError("what went wrong"), False)
    RunFolder(tmp_path / "killed", {}).begin("a: 1\n")
    return tmp_path


def test_the_table_is_tidy_and_hides_nothing(runs):
    table = results.load(runs, runs / "rtn").set_index("status")
    assert sorted(table.index) == ["failed", "finished", "finished", "unfinished"]
    finished = table.loc["finished"].set_index("quantizer")
    assert finished.loc["haq", "perplexity.text"] == 30.1
    assert finished.loc["rtn", "change_percent.text"] == pytest.approx(100 / 30)
    assert set(finished["config.quantizer.weight_bits"]) == {8}
    assert table.loc["failed", "error"] == "what went wrong"
    assert table.loc["unfinished", "name"] == "killed"


def test_settings_of_an_older_version_are_read_under_their_present_names(tmp_path):
    folder = RunFolder(tmp_path, {"quantizer": {"damp": 0.02}, "objective": "kl.c4", "offload": {"cache": "lru"}})
    folder.begin("a: 1\n")
    folder.finish({"model": "m", "overrides": []}, {}, {})
    (run,) = results.load(tmp_path).to_dict("records")
    assert run["config.quantizer.dampening_frac"] == 0.02
    assert run["config.search_metric"] == "kl.c4"
    assert run["config.offload.eviction"] == "lru"


def test_a_sweeps_runs_are_named_by_what_they_differ_in_and_others_by_their_folder(runs):
    table = results.load(runs / "rtn", runs / "haq")
    assert list(table["name"]) == ["quantizer=rtn", "quantizer=haq"]
    alone = RunFolder(runs / "my-run", {})
    alone.begin("a: 1\n")
    alone.finish({"model": "m", "overrides": ["model=m", "quantizer=gptq"], "sweep": None}, {}, {})
    assert list(results.load(runs / "rtn", runs / "haq", runs / "my-run")["name"])[2] == "my-run"


def test_names_with_brackets_are_shown_whole(tmp_path, capsys):
    for fold in ("[norm,value,up]", "[norm]"):
        folder = RunFolder(tmp_path / fold, {})
        folder.begin("a: 1\n")
        facts = {"model": "m[0]", "quantizer": "haq", "overrides": [f"quantizer.fold={fold}"], "sweep": "s"}
        folder.finish(facts, {}, {"perplexity.text": 31.0, "perplexity_fp.text": 30.0})
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"quantizer\.fold=\[norm\] +\W", printed)
    assert "quantizer.fold=[norm,value,up] " in printed
    show_results(read_results(tmp_path / "[norm]" / "results.json"), tmp_path)
    assert "m[0]" in capsys.readouterr().out


def test_csv_and_figure(runs, capsys):
    csv, figure = runs / "out" / "table.csv", runs / "out" / "figure.png"
    main([str(runs), "--csv", str(csv), "--figure", str(figure)])
    printed = capsys.readouterr().out
    assert "what went wrong" in printed
    assert re.search(r"haq\W+finished\W+30\.1000", printed), "names are not cut where there is no terminal"
    assert len(pd.read_csv(csv)) == 4
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in csv.parent.iterdir()) == ["figure.png", "table.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/rnt"], "there is no folder .*did you mean 'rtn'"),
        (["{}", "--figure", "x.gif"], "'gif' is not one of png, svg, pdf"),
        (["{}/killed", "--figure", "x.png"], "no finished run"),
        (["{}", "--csv", "/proc/no/table.csv"], "/proc/no"),
    ],
)
def test_mistakes(arguments, message, runs, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([argument.format(runs) for argument in arguments])
    assert re.search(message, capsys.readouterr().err)


def test_one_message_of_several_runs_is_printed_once(runs, capsys):
    failed = RunFolder(runs / "deep" / "worse", {})
    failed.begin("a: 1\n")
    failed.fail({"model": "m", "overrides": ["quantizer=worse"]}, ValueError("what went wrong"), False)
    main([str(runs)])
    printed = capsys.readouterr().out
    assert printed.count("failed: what went wrong") == 1
    assert printed.count("failed: the same message as above") == 1


def test_an_empty_folder_is_no_mistake(tmp_path, capsys):
    main([str(tmp_path)])
    assert "no runs below" in capsys.readouterr().out
    assert list(results.load(tmp_path)) == ["folder", "name", "status", "error"]


def _finished(folder, model, quantizer, metrics, config=None, **facts):
    run = RunFolder(folder, config or {})
    run.begin("a: 1\n")
    overrides = [f"quantizer={quantizer}"]
    run.finish({"model": model, "quantizer": quantizer, "overrides": overrides, **facts}, {}, metrics)


def test_two_models_of_one_label_are_two_models(tmp_path):
    for where in ("a", "b"):
        config = {"model": {"name": f"/models/{where}/final"}}
        _finished(tmp_path / where, "final", "rtn", {"perplexity.text": 3.0}, config)
    assert sorted(results.load(tmp_path)["model"]) == ["a/final", "b/final"]


def test_runs_are_in_the_order_of_their_start_in_any_time_zone(tmp_path):
    starts = {
        "third": "2026-01-01T12:00:00+0000",
        "first": "2026-01-01T12:30:00+0200",
        "second": "2026-01-01T11:00:00Z",
    }
    for name, started in starts.items():
        _finished(tmp_path / name, "m", "rtn", {}, started=started)
    _finished(tmp_path / "unknown", "m", "rtn", {})
    names = [folder.rpartition("/")[2] for folder in results.load(tmp_path)["folder"]]
    assert names == ["first", "second", "third", "unknown"]


def test_a_checkpoint_counts_as_quantised(tmp_path):
    _finished(tmp_path / "fp", "m", "none", {})
    config = {"model": {"_target_": "haq_lab.checkpoint.model.QuantizedCheckpoint", "path": "x"}}
    _finished(tmp_path / "checkpoint", "x", "none", {}, config)
    _finished(tmp_path / "haq", "m", "haq", {})
    assert results.load(tmp_path).set_index("folder")["quantized"].to_dict() == {
        str(tmp_path / "fp"): False,
        str(tmp_path / "checkpoint"): True,
        str(tmp_path / "haq"): True,
    }


BUSY = {"latency.prefill_ms": 30.0, "latency.decode_ms_per_token.mean": 5.0, "latency.wall_over_cpu": 1.4}
RATIOS = {"latency.speed_vs_fp.prefill": 4.0, "latency.speed_vs_fp.decode": 3.0, "latency.threads": 1.0}


def test_ratios_replace_times_if_every_run_has_them(tmp_path, capsys):
    errors = {f"{name}.stderr": 0.05 for name in RATIOS if "speed" in name}
    _finished(tmp_path / "a", "m", "rtn", BUSY | RATIOS | errors)
    _finished(tmp_path / "quality", "m", "haq", {"perplexity.text": 3.0})
    main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "x fp32" in shown
    assert "~4.00 ± 0.05" in shown
    assert " 3.00 ± 0.05" in shown, "the ratio of decoding holds with one thread"
    assert "ms/token" not in shown
    _finished(tmp_path / "b", "m", "gptq", BUSY)
    main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "4.00 ± 0.05" in shown
    assert "~30.0" in shown
    assert "~5.00" in shown
    assert shown.count("~ the machine was busy") == 2
