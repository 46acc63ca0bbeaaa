"""The Pareto front against its definition, and what the GPU holds beside experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import launch
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from haq_lab.cli.offload import main
from haq_lab.hardware.local import hardware
from haq_lab.models.sources import TinyModel
from haq_lab.offload.costs.from_spec import LAUNCH, machine_costs
from haq_lab.offload.costs.model_shape import MIXTRAL, Shape
from haq_lab.offload.policies.path_model import fit_path_model
from haq_lab.offload.simulate import capacity_plan as planning
from haq_lab.offload.simulate.capacity_plan import fixed_bytes, mark_pareto
from haq_lab.pipeline.preflight import measure_size


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=15))
def test_the_front_is_what_nothing_beats(points):
    table = mark_pareto(pd.DataFrame(points, columns=["memory_bytes", "simulated_ms"]))
    front = set(map(tuple, table[table["pareto"]][["memory_bytes", "simulated_ms"]].to_numpy().tolist()))
    beaten = {a for a in points for b in points if b != a and b[0] <= a[0] and b[1] <= a[1]}
    assert front == set(points) - beaten
    assert table["pareto"].sum() == len(front), "equal ones count once"


def test_a_plan_ends_with_all_experts_resident():
    assert sorted(planning.SHARES) == [*planning.SHARES]
    assert planning.SHARES[-1] == 1


def test_a_token_adds_its_cache_and_its_workspace_in_16_bits():
    added = fixed_bytes(MIXTRAL, "int8", 2049) - fixed_bytes(MIXTRAL, "int8", 2048)
    assert added == 2 * (MIXTRAL.kv_per_token + MIXTRAL.work_per_token)


def test_a_head_in_int8_is_half_of_one_in_16_bits():
    int8 = replace(MIXTRAL, head_bytes=1)
    head = 4096 * 32000
    for device in ("int8", "fp16"):
        assert fixed_bytes(MIXTRAL, device, 2048) - fixed_bytes(int8, device, 2048) == head
        costs = [machine_costs(hardware("rtx3060_12g"), shape, "int8", device) for shape in (MIXTRAL, int8)]
        assert costs[0].outside(1) - LAUNCH == pytest.approx(2 * (costs[1].outside(1) - LAUNCH))
        assert costs[0].rest(1) == costs[1].rest(1)


@pytest.mark.parametrize(("tied", "head_bytes", "tables"), [(False, 2, 4), (False, 1, 3), (True, 2, 2), (True, 1, 3)])
def test_a_tied_head_is_the_embedding_unless_it_is_in_int8(tied, head_bytes, tables):
    shape = replace(MIXTRAL, tied=tied, head_bytes=head_bytes)
    without = replace(shape, outside=0)
    assert fixed_bytes(shape, "int8", 2048) - fixed_bytes(without, "int8", 2048) == tables * 4096 * 32000


@pytest.mark.parametrize("make", [MixtralConfig, Qwen3MoeConfig, OlmoeConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_are_what_the_preflight_counts(make, tied):
    config = make(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, tie_word_embeddings=tied)
    assert Shape.of(config).tables_bytes == 2 * (measure_size(config).shell - config.hidden_size)


def test_a_checkpoint_says_that_its_head_is_in_int8(tmp_path, monkeypatch, make_trace):
    """As does the flag, where there is only a shape."""
    trace, kept = tmp_path / "made.trace", tmp_path / "kept"
    make_trace(tokens=40, layers=2).save(trace)
    small = ["model=tiny_mixtral", "quantizer=rtn", "measure=[]", "data=[]", "tracking=none"]
    done = launch(*small, "quantizer.lm_head=true", f"checkpoint.dir={kept}", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    monkeypatch.setattr(planning, "FORMATS", planning.FORMATS[:1])
    monkeypatch.setattr(planning, "fit_path_model", partial(fit_path_model, steps=5))
    monkeypatch.setattr(planning, "plan", partial(planning.plan, shares=(0.5,)))
    tiny = TinyModel("mixtral").folder()
    least = []
    for more in (["--shape", str(tiny)], ["--shape", str(kept)], ["--shape", str(tiny), "--int8-head"]):
        main(["plan", str(trace), str(trace), "--tokens=4", f"--out={tmp_path}", *more])
        least.append(pd.read_csv(tmp_path / "plan.csv")["memory_bytes"].min())
    assert least == [least[0], least[0] - 64 * 257, least[0] - 64 * 257]
    int8 = replace(MIXTRAL, head_bytes=1)
    main(["plan", str(trace), str(trace), "--tokens=1", f"--out={tmp_path}", "--int8-head", "--hardware=a100_80g"])
    assert (
        pd.read_csv(tmp_path / "plan.csv")["memory_bytes"].min()
        == fixed_bytes(int8, "int8", 2048) + 128 * MIXTRAL.expert
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape=mixtrl"], "'mixtrl' is not mixtral, nor a folder with a config.json (did you mean 'mixtral'?)"),
        (["--tokens=0"], "plan: --tokens 0 is not at least 1"),
        (["--context=-1"], "plan: --context -1 is not at least 1"),
        (["--hardware=rtx3060_12"], "hardware: 'rtx3060_12' is not one of"),
    ],
)
def test_mistakes_of_a_plan(options, message, tmp_path, capsys, make_trace):
    trace = tmp_path / "made.trace"
    make_trace(tokens=40, layers=2).save(trace)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(trace), str(trace), f"--out={tmp_path / 'plan'}", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "plan").exists()


def test_a_misspelt_trace_is_told_the_nearest(tmp_path, capsys, make_trace):
    make_trace(tokens=40, layers=2).save(tmp_path / "made.trace")
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / "mad.trace"), str(tmp_path / "made.trace"), f"--out={tmp_path}"])
    assert "mad.trace' (did you mean 'made.trace'?)" in capsys.readouterr().err
