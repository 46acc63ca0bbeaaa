"""Paired comparisons of runs, and groups of runs that differ in their seeds."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from launching import TINY, launch

import haq_lab
from haq_lab.cli.results import main
from haq_lab.results.comparison import compare, compare_all, holm, sign_flip_p
from haq_lab.results.load import load
from haq_lab.results.seeds import seed_table
from haq_lab.results.windows import Scores, over_seeds
from haq_lab.utils.errors import UserError

STAMP = {"seqlen": 64, "text_sha256": "a", "comparable_with": []}


def write_run(folder: Path, kl: list[float], nll: list[float], stamp: dict | None = None, fp: float = 2.0) -> Path:
    """A run folder with the files that a comparison reads."""
    folder.mkdir(parents=True)
    windows = {"data": "text", "window": range(len(kl)), "document": range(len(kl)), "nll_fp": fp, "nll": nll, "kl": kl}
    pd.DataFrame(windows).to_csv(folder / "windows.csv", index=False)
    record = {"schema": 1, "run": {"model": "m"}, "config": {}, "metrics": {}, "protocol": {"text": stamp or STAMP}}
    (folder / "results.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def near(tmp_path) -> Path:
    return write_run(tmp_path / "near", [0.010, 0.012, 0.011, 0.013, 0.012, 0.010, 0.011, 0.012], [2.1] * 8)


@pytest.fixture
def far(tmp_path) -> Path:
    return write_run(
        tmp_path / "far", [0.030, 0.034, 0.031, 0.033, 0.035, 0.030, 0.032, 0.036], [2.1, 2.2, 2.0, 2.3] * 2
    )


def test_a_clear_difference_has_a_verdict(near, far):
    kl = compare([near], [far], ("near", "far")).set_index("metric").loc["kl"]
    paired = pd.read_csv(near / "windows.csv")["kl"] - pd.read_csv(far / "windows.csv")["kl"]
    assert kl["difference"] == pytest.approx(paired.mean())
    assert kl["stderr"] == pytest.approx(paired.sem())
    assert kl["p"] == 2 / 2**8  # only the observed signs and their opposites are as extreme
    assert kl["p_holm"] == 2 * kl["p"]
    assert kl["verdict"] == "near is better"


def test_notebooks_have_a_short_spelling(near, far, monkeypatch):
    expected = compare([near], [far])
    pd.testing.assert_frame_equal(haq_lab.results.compare(near, str(far)), expected)
    monkeypatch.chdir(near.parent)
    pd.testing.assert_frame_equal(haq_lab.results.compare("nea*", "far"), expected)
    with pytest.raises(UserError, match=r"RUNS: 'fra' is not the folder of a finished run \(did you mean 'far'"):
        haq_lab.results.compare("near", "fra")
    with pytest.raises(AttributeError, match="comparee"):
        haq_lab.results.comparee  # noqa: B018


def test_noise_has_none(near, far):
    row = compare([near], [far]).set_index("metric").loc["nll"]
    assert row["verdict"] == "no difference beyond noise"
    assert row["windows_needed"] == pytest.approx(8 * ((row["high"] - row["difference"]) / row["difference"]) ** 2)


def test_few_windows_can_never_separate(tmp_path):
    near, far = (write_run(tmp_path / str(kl), [kl, kl * 1.01, kl * 1.02], [2.1] * 3) for kl in (0.01, 0.03))
    row = compare([near], [far]).set_index("metric").loc["kl"]
    assert row["p"] == 2 / 2**3
    assert row["verdict"] == "no difference beyond noise"
    assert row["windows_needed"] == 7  # 2 comparisons * 2 / 2^7 < 0.05


def test_the_verdict_does_not_depend_on_the_order(near, far):
    one = compare([near], [far], ("near", "far"))
    other = compare([far], [near], ("far", "near"))
    assert list(one["verdict"]) == list(other["verdict"])
    assert list(one["difference"]) == pytest.approx(list(-other["difference"]))


def test_other_windows_are_refused(near, tmp_path):
    other = write_run(tmp_path / "other", [0.01] * 8, [2.1] * 8, STAMP | {"seqlen": 128})
    with pytest.raises(UserError, match=r"because seqlen is 64 in .* and 128 in"):
        compare([near], [other])


def test_kl_needs_the_same_reference(near, tmp_path):
    other = write_run(tmp_path / "other", [0.01] * 8, [2.1] * 8, fp=3.0)
    assert list(compare([near], [other])["metric"]) == ["nll"]


def test_a_run_without_windows_is_refused(near, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty' has no windows\.csv"):
        compare([near], [tmp_path / "empty"])
    with pytest.raises(UserError, match="Name at least two"):
        compare_all({"near": [near]})


def test_seeds_widen_the_interval():
    windows = np.array([1.0, 2.0, 3.0, 4.0])
    same = over_seeds(Scores(np.stack([windows, windows]), [0, 1, 2, 3]))
    spread = over_seeds(Scores(np.stack([windows - 1, windows + 1]), [0, 1, 2, 3]))
    assert same.mean == spread.mean == 2.5
    assert same.stderr == pytest.approx(np.std(windows, ddof=1) / 2)
    assert spread.stderr**2 - same.stderr**2 == pytest.approx(2 / 2)  # the variance of -1 and 1 is 2, over two runs
    assert spread.high - spread.mean > same.high - same.mean


@pytest.mark.parametrize("values", [[1.0, -0.5, 2.0], [0.2, 0.1, -0.4, 0.3, 0.9]])
def test_sign_flips_are_exact_if_they_are_few(values):
    flips = [abs(np.dot(signs, values)) for signs in itertools.product((-1, 1), repeat=len(values))]
    assert sign_flip_p(np.array(values)) == pytest.approx(np.mean(np.array(flips) >= abs(sum(values)) - 1e-12))


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two bit widths, each with two seeds of calibration."""
    folder = tmp_path_factory.mktemp("sweep")
    values = ["quantizer.weight_bits=4,8", "calibration.seed=0,1", "data.python_docs.windows=8", "quantizer=gptq"]
    outcome = launch("-m", *TINY, *values, f"hydra.sweep.dir={folder}")
    assert outcome.code == 0, outcome.err
    return folder


def test_runs_that_differ_in_seeds_are_one_group(sweep):
    runs = load(sweep)
    table = seed_table(runs).set_index("config.quantizer.weight_bits")
    assert list(table["runs"]) == [2, 2]
    for bits, group in runs.groupby("config.quantizer.weight_bits"):
        assert table.loc[bits, "kl.python_docs"] == pytest.approx(group["kl.python_docs"].mean())
        assert table.loc[bits, "spread.kl.python_docs"] == pytest.approx(group["kl.python_docs"].std())
        assert table.loc[bits, "kl.python_docs.stderr"] > 0
        assert table.loc[bits, "kl.python_docs.low"] < table.loc[bits, "kl.python_docs"]


def test_the_commands_print_groups_and_verdicts(sweep, capsys, tmp_path):
    main([str(sweep), "--seeds"])
    assert "quantizer.weight_bits=4" in capsys.readouterr().out
    main(["compare", str(sweep), "--by", "quantizer.weight_bits", "--csv", str(tmp_path / "table.csv")])
    out = capsys.readouterr().out
    assert "8 is better" in out
    assert list(pd.read_csv(tmp_path / "table.csv")["metric"]) == ["kl", "nll"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "quantizer.weight_bit"], "there is no column 'quantizer.weight_bit' (did you mean"),
        (["nowhere"], "RUNS: 'nowhere' is not the folder of a finished run"),
    ],
)
def test_mistakes_are_one_line(sweep, capsys, arguments, message):
    folders = [str(sweep)] if arguments[0] == "--by" else []
    with pytest.raises(SystemExit) as ended:
        main(["compare", *folders, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
