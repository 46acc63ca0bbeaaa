"""Hit-rate curves: every contender at every budget, bounded by Belady, and mistakes told before anything is fitted."""

from __future__ import annotations

import pytest

from haq_lab.offload.policies.path_model import fit_path_model
from haq_lab.offload.simulate import hit_rate_curves as curves
from haq_lab.offload.simulate.hit_rate_curves import CONTENDERS, closed, hit_rates
from haq_lab.utils.errors import UserError


def test_curves(make_trace, monkeypatch):
    monkeypatch.setattr(curves, "fit_path_model", lambda profile: fit_path_model(profile, steps=20))
    profile, test = make_trace(seed=1), make_trace(seed=2, tokens=200)
    table = hit_rates(profile, test, [0.25, 0.75, 1.0])
    assert len(table) == 3 * len(CONTENDERS)
    pairs = table.pivot(index="policy", columns="budget", values="pairs")
    assert (pairs <= pairs.loc["Belady's bound"] + 1e-9).all(axis=None)
    assert (pairs[1.0] == 1).all()
    assert sorted(closed(table)) == [0.25, 0.75], "all resident: there is no distance to close"
    assert all(share <= 1 for share in closed(table).values())


@pytest.mark.parametrize("budget", [0, -0.5, 40, 0.01])
def test_a_budget_that_is_no_share_is_a_mistake(make_trace, budget):
    with pytest.raises(UserError, match=f"budgets: {budget} is not a share of 32 experts"):
        hit_rates(make_trace(), make_trace(), [0.5, budget])


def test_traces_of_two_models_are_a_mistake(make_trace):
    with pytest.raises(UserError, match="5 layers with 8 experts are needed"):
        hit_rates(make_trace(), make_trace(layers=5), [0.5])
