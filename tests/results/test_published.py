"""The file of published figures is complete, and each figure is compared with the right runs."""

from __future__ import annotations

import pandas as pd
import pytest

from haq_lab.config.help import options
from haq_lab.results.load import show_published
from haq_lab.results.published import beside, published


def _run(**facts) -> pd.DataFrame:
    return pd.DataFrame([{"name": "a run", "quantizer": "haq", "offload": "none", "experiment": None} | facts])


def test_every_figure_is_cited_and_belongs_to_an_experiment_that_is_there():
    table = published()
    known = table[table["value"].notna()]
    assert (known["source"] != "").all()
    assert (known["model"] != "").all()
    assert set(table["experiment"]) - {""} <= set(options("experiment"))
    assert not table.duplicated(["model", "when", "metric", "source", "experiment"]).any()


def test_a_perplexity_is_comparable_only_under_the_published_protocol():
    run = {"model": "Mixtral-8x7B-v0.1", "perplexity.wikitext2": 3.87}
    for protocol, comparable in (("wikitext2 perplexity of GPTQ", "yes"), ("", "no: another protocol")):
        figures = beside(_run(**run, **{"comparable.wikitext2": protocol}))
        assert figures["published"].tolist() == [3.864]
        assert figures["comparable"].tolist() == [comparable]
        assert figures["difference_percent"][0] == pytest.approx((3.87 / 3.864 - 1) * 100)


def test_a_run_of_the_papers_experiment_on_another_model_gets_the_papers_figures_marked():
    run = {"model": "smol_moe", "perplexity.c4": 30.0, "comparable.c4": "C4 perplexity"}
    assert beside(_run(**run)).empty
    figures = beside(_run(**run, experiment="paper_mixtral"))
    assert figures["comparable"].tolist() == ["no: another model"]
    assert figures["published"].tolist() == [7.427]
    assert figures["difference_percent"].isna().all()


def test_what_is_unknown_stays_empty(capsys):
    figures = beside(_run(**{"model": "opt-1.3b", "perplexity.wikitext2": 14.7}, experiment="paper_opt"))
    assert figures["published"].isna().tolist() == [True]
    show_published(figures)
    assert "14.7" in capsys.readouterr().out


def test_conditions_may_name_settings():
    run = {"model": "opt-13b", "quantizer": "smoothquant", "latency.prefill_ms": 100.0}
    figures = beside(_run(**run, **{"config.quantizer.activations": "static"}))
    assert figures["published"].tolist() == [112.1]
    assert figures["comparable"].tolist() == ["no: another machine"]
