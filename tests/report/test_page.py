"""The content of the page, without a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from haq_lab.cli import report as command
from haq_lab.measure.metrics import find_metric
from haq_lab.models.sources import TinyModel
from haq_lab.report import cost, quality
from haq_lab.report.chart import looks
from haq_lab.report.collect import collect
from haq_lab.report.page import CHARTS, _summary, page
from haq_lab.report.provenance import run_table
from haq_lab.report.routing import _measured
from haq_lab.report.tables import Cell, _difference, published_table, result_tables
from haq_lab.results import load as results
from haq_lab.tracking.run_folder import RunFolder


def test_the_page_is_self_contained_and_tells_everything(report, studied):
    text = report.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert report.stat().st_size < 4e6
    for title in CHARTS:
        assert f"<h3>{title}</h3>" in text
    assert "a bug in a plug-in" in text  # the failure's message
    for column in ("perplexity", "decode, ms/token", "hit rate, %", "tokens_scored", "text_sha256", "torch"):
        assert column in text
    for run in results.load(studied)["folder"]:
        assert run.replace("&", "&amp;") in text


def test_differences_and_their_errors_are_true(studied):
    found = collect(studied)
    table = next(table for table in result_tables(found) if table.title == "tiny_llama")
    column = table.head.index("python_docs perplexity")
    by_run = {row[0].text: row[column] for row in table.rows}
    runs = found.finished[found.finished["model"] == "tiny_llama"].set_index("name")
    quantised = runs[runs["quantizer"] != "none"]
    assert not any(cell.best for cell in by_run.values())  # two windows tell nothing apart
    assert "cannot be told apart: more windows are needed" in table.note
    best = quantised["perplexity.python_docs"].idxmin()
    change, error = (quantised.loc[best, f"{name}.python_docs"] for name in ("change_percent", "change_percent_stderr"))
    assert by_run[best.removeprefix("tiny_llama: ")].note == f"{change:+.2f} ± {error:.2f} %"


def test_weights_are_saved_of_the_whole_model_wherever_its_experts_lie(studied):
    runs = results.load(studied / "experts")
    entries = sum(
        tensor.numel() for tensor in load_file(next(TinyModel("mixtral", 1).folder().glob("*.safetensors"))).values()
    )
    assert list(runs["memory.weights_fp16_bytes"]) == [2 * entries] * len(runs)
    assert list(runs["saved_percent.memory"]) == list((1 - runs["memory.weights_bytes"] / (2 * entries)) * 100)
    assert list(runs["started"]) == sorted(runs["started"])


def test_runs_on_other_windows_are_not_compared(studied, tmp_path):
    shutil.copytree(studied / "dense", tmp_path / "dense")
    first, second, _ = sorted((tmp_path / "dense").rglob("results.json"))
    for path, change in ((first, {"windows": 3}), (second, None)):
        content = json.loads(path.read_text())
        protocol = content["protocol"]
        content["protocol"] = {} if change is None else protocol | {"python_docs": protocol["python_docs"] | change}
        path.write_text(json.dumps(content))
    titles = [table.title for table in result_tables(collect(tmp_path)) if ": " not in table.title]
    assert sorted(titles) == ["tiny_llama, not evaluated on text", "tiny_llama, windows 1", "tiny_llama, windows 2"]


def test_policies_have_colours_of_their_own_on_the_front(studied):
    found = collect(studied)
    runs = found.runs[found.runs["status"] == "finished"]
    front = cost.pareto(found).variants["tiny_mixtral: decode, ms per token"]
    assert {trace.name for trace in front.data if trace.name} == {"GPTQ"}
    changed = runs["model"] == "tiny_mixtral"
    found.runs.loc[runs[changed].index[:1], "offload"] = "lru"
    front = cost.pareto(found).variants["tiny_mixtral: decode, ms per token"]
    assert {trace.name for trace in front.data if trace.name} == {"GPTQ, haq", "GPTQ, lru"}


def test_what_is_missing_is_told_with_its_reason(studied, tmp_path):
    folder = results.load(studied / "dense").set_index("quantizer").loc["none", "folder"]
    shutil.copytree(folder, tmp_path / "run")
    text = page(collect(tmp_path), "one run")
    missing = text[text.index('id="missing"') :]
    for title in (
        "Perplexity by method",
        "Outliers before and after smoothing",
        "Expert popularity",
        "Hit rate by budget",
    ):
        assert re.search(rf"<b>{title}</b>: \w+", missing), title
    assert "<h3>Latency distributions</h3>" in text


def test_a_replay_alone_has_a_page(studied):
    text = page(collect(studied / "replay"), "replay")
    assert "<h3>Hit rate by budget</h3>" in text
    assert "No run is finished." in text


def test_runs_of_one_name_stay_apart(studied, tmp_path):
    folder = results.load(studied / "dense")["folder"][0]
    for parent in ("one", "other"):
        shutil.copytree(folder, tmp_path / parent / ("a long name " * 12))
    names = collect(tmp_path).runs["name"]
    assert names.nunique() == 2
    assert (names.str.len() < 100).all()


def test_a_run_that_failed_before_its_model_was_known_is_not_named_as_one_that_did_not(tmp_path):
    for model, bits in (("m", 8), ("n", 8), (None, 3)):
        folder = RunFolder(tmp_path / f"{model}{bits}", {})
        facts = {"overrides": [f"model={model}", "quantizer=rtn", f"quantizer.weight_bits={bits}"], "sweep": "s"}
        folder.begin("a: 1\n")
        if model is None:
            folder.fail(facts, ValueError("3 bits"), mistake=False)
        else:
            folder.finish(facts | {"model": model, "quantizer": "rtn"}, {}, {})
    assert list(collect(tmp_path).runs["name"]) == ["None: RTN", "m: RTN", "n: RTN"]


def test_no_two_of_many_lines_look_alike():
    names = [str(number) for number in range(21)]
    assert len(set(looks(names).values())) == 21


def test_a_damaged_table_is_left_out_and_told(studied, tmp_path, capsys):
    shutil.copytree(
        results.load(studied / "dense").set_index("quantizer").loc["smoothquant", "folder"], tmp_path / "run"
    )
    for name in ("layers.csv", "ranges.safetensors"):
        (tmp_path / "run" / name).write_bytes(b"a,b\n1,2,3\n\xff\xfe")
    text = page(collect(tmp_path), "damaged")
    assert capsys.readouterr().err.count("is ignored because it is damaged: ") == 2
    assert "<b>Error and strength by layer</b>" in text
    assert "<h3>Perplexity by method</h3>" in text


def test_hostile_names_stay_text(studied, tmp_path):
    folder = next(path.parent for path in (studied / "dense").rglob("results.json"))
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    content = json.loads(path.read_text())
    content["run"]["model"] = "</script><script>alert(1)</script>"
    path.write_text(json.dumps(content))
    text = page(collect(tmp_path), "<b>title</b>")
    assert "<script>alert(1)" not in text
    assert "<b>title</b>" not in text


def test_published_figures_stand_beside_ours(studied, tmp_path):
    folder = results.load(studied / "dense").set_index("quantizer").loc["none", "folder"]
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    content = json.loads(path.read_text())
    content["run"] |= {"model": "opt-125m"}
    content["metrics"] = {"perplexity.wikitext2": 27.65 * 1.01, "perplexity_fp.wikitext2": 27.65 * 1.01}
    path.write_text(json.dumps(content))
    table = published_table(collect(tmp_path))
    assert table is not None
    assert [row[-2:] for row in table.rows] == [[Cell("27.65"), Cell("+1.00 %")]]
    assert table.rows[0][1] == Cell("wikitext2 perplexity")
    assert published_table(collect(studied)) is None


@pytest.mark.parametrize(("where", "message"), [("nowhere", "there is no folder"), (".", "no runs, replays or plans")])
def test_mistakes(where, message, tmp_path: Path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tmp_path / where), "-o", str(tmp_path / "report.html")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_head_counts_only_what_is_known(studied, tmp_path):
    shutil.copytree(studied / "dense", tmp_path / "dense")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("force: false\n")
    summary = {label: value for value, label in _summary(collect(tmp_path))}
    assert summary["unfinished"] == 1
    assert summary["methods"] == "RTN, SmoothQuant"


def test_budgets_in_experts_and_bytes_are_on_the_hit_rate_curve():
    """16 experts: half of them by percent, 4 by number, 12 by what fits into 5GB."""
    runs = pd.DataFrame(
        {
            "name": ["a", "b", "c"],
            "offload": ["lru", "lru", "haq"],
            "config.offload.budget": ["50%", "4", "5GB"],
            "offload.slots": [8.0, 4.0, 12.0],
            "offload.hit_rate_pairs": [0.5, 0.3, 0.8],
        }
    )
    for experts in (None, pd.DataFrame({"run": ["a", "b", "c"] * 16})):
        measured = _measured(runs, experts).set_index("policy")
        assert sorted(measured.loc["lru", "budget"]) == [0.25, 0.5]
        assert measured.loc["haq", "budget"] == 0.75


def test_hit_rates_of_runs_with_different_settings_are_not_averaged():
    """Only the third and the fourth run have equal settings."""
    runs = pd.DataFrame(
        {
            "name": ["a", "b", "c", "d"],
            "offload": ["lru"] * 4,
            "quantizer": ["none", "rtn", "rtn", "rtn"],
            "config.offload.budget": ["50%"] * 4,
            "config.offload.prefetch": ["next", "next", "none", "none"],
            "config.quantizer.weight_bits": [None, "8", "8", "8"],
            "config.force": [False, True, False, True],
            "offload.hit_rate_pairs": [0.5, 0.3, 0.8, 0.6],
        }
    )
    measured = _measured(runs, None).set_index("policy")["pairs"]
    assert measured.round(6).to_dict() == {
        "lru, quantizer=none, offload.prefetch=next": 0.5,
        "lru, quantizer=rtn, offload.prefetch=next": 0.3,
        "lru, quantizer=rtn, offload.prefetch=none": 0.7,
    }


def test_limitations_and_random_prompts_are_stated(studied, tmp_path):
    shutil.copytree(studied / "experts", tmp_path / "experts")
    path = next((tmp_path / "experts").rglob("results.json"))
    content = json.loads(path.read_text())
    before = [table.title for table in result_tables(collect(tmp_path))]
    content["run"]["offload_limitation"] = "offload=haq ignores the path of a token."
    content["protocol"]["latency"] = {"text": "random", "tokens": 8, "seed": 0}
    path.write_text(json.dumps(content))
    found = collect(tmp_path)
    tables = result_tables(found)
    assert [table.title for table in tables] == before  # the stamp of the prompts does not split a table
    assert sum("offload=haq ignores the path of a token." in table.note for table in tables) == 1
    assert [row[0].note for table in tables for row in table.rows if row[0].note] == [
        "random prompts"
    ] * 2  # cost, offloading
    assert "latency (random prompts)" in page(found, "title")


def test_the_report_says_how_busy_a_machine_was(studied, tmp_path):
    shutil.copytree(studied / "dense", tmp_path / "dense")
    paths = sorted((tmp_path / "dense").rglob("results.json"))
    for path, share in zip(paths, (0.02, 0.02, 0.45), strict=True):
        content = json.loads(path.read_text())
        quiet = {"latency.wall_over_cpu": 1.0, "latency.spread": 0.0, "latency.machine.others_share": share}
        content["metrics"] |= quiet | {"latency.machine.throttled": 0}
        path.write_text(json.dumps(content))
    tables = result_tables(collect(tmp_path))
    (table,) = (table for table in tables if "decode, ms/token" in table.head)
    column = table.head.index("decode, ms/token")
    assert sum(row[column].text.startswith("~") for row in table.rows) == 1
    assert not any(row[column].best for row in table.rows), "a marked time is no measure of the others"
    notes = " ".join(table.note for table in tables)
    assert notes.count("the machine was busy when latency was measured") == 1
    assert "others used 45 % of the processors." in notes


def test_a_column_has_one_baseline():
    run = pd.Series({"memory.weights_bytes": 1.0, "memory.weights_fp16_bytes": 2.0, "latency.prefill_ms": 3.0})
    run["memory.peak_rss_bytes"] = 9.0
    fp = pd.DataFrame({"memory.weights_bytes": [4.0], "latency.prefill_ms": [6.0], "memory.peak_rss_bytes": [3.0]})
    notes = {}
    for name in fp:
        metric = find_metric(name)
        assert metric is not None
        notes[name] = [_difference(name, metric, run, runs) for runs in (fp, pd.concat([fp, fp * 2]))]
    assert notes == {
        "memory.weights_bytes": ["-50.00 %", "-50.00 %"],  # of fp16, never of fp32
        "latency.prefill_ms": ["-50.00 %", ""],  # two unquantised runs are no baseline
        "memory.peak_rss_bytes": ["", ""],  # it includes the quantization, which the unquantised run does not do
    }


def test_a_sweep_shows_full_precision_once_and_methods_in_the_papers_order(write_sweep):
    found = collect(write_sweep())
    methods = ["RTN", "SmoothQuant", "GPTQ", "HAQ"]
    names = ["full precision", *(f"{method}, {scheme}" for scheme in ("per token", "static") for method in methods)]
    tables = result_tables(found)
    assert [table.title for table in tables] == ["smol", "smol: cost"]
    for table in tables:
        assert [row[0].text for row in table.rows] == names
        assert table.numeric <= 6
    assert tables[0].note == " ".join(
        f"On {text}, the KL divergence of HAQ, per token is lower than that of the others beyond noise."
        for text in ("wikitext2", "c4")
    )
    assert len(run_table(found).rows) == 10  # the table of all runs hides nothing


def test_full_precision_is_a_row_even_if_no_run_has_it(write_sweep):
    sweep = write_sweep()
    for folder in sweep.glob("quantizer=none*"):
        shutil.rmtree(folder)
    table = result_tables(collect(sweep))[0]
    assert [cell.text for cell in table.rows[0]] == ["full precision", "22.5000", "", "", "22.5000", "", ""]


def test_full_precision_on_other_windows_is_shown_too(write_sweep):
    sweep = write_sweep()
    path = next(sweep.glob("quantizer=none*static")) / "results.json"
    content = json.loads(path.read_text())
    content["protocol"]["c4"]["seqlen"] = 128
    path.write_text(json.dumps(content))
    found = collect(sweep)
    assert list(found.shown["label"]).count("full precision (2)") == 1


@pytest.mark.parametrize("chart", [quality.perplexity, quality.divergence])
def test_a_static_row_does_not_hide_the_others(chart, write_sweep):
    drawn = chart(collect(write_sweep()))
    figure = drawn.variants["smol, wikitext2"]
    bars = dict(zip(figure.data[0].y, figure.data[0].x, strict=True))
    seen = (bars["RTN, per token"] - bars["HAQ, per token"]) / max(bars.values())
    assert seen > 0.3  # 3.15 % and 0.20 %, beside 112 %
    assert figure.layout.xaxis.ticktext[0] == "0"
    assert (np.asarray(figure.data[0].error_x["array"]) > 0).all()
