"""The Pareto front against its definition."""

from __future__ import annotations

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.offload.plan import mark_pareto


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=15))
def test_the_front_is_what_nothing_beats(points):
    table = mark_pareto(pd.DataFrame(points, columns=["memory_bytes", "simulated_ms"]))
    front = set(map(tuple, table[table["pareto"]][["memory_bytes", "simulated_ms"]].to_numpy().tolist()))
    beaten = {a for a in points for b in points if b != a and b[0] <= a[0] and b[1] <= a[1]}
    assert front == set(points) - beaten
    assert table["pareto"].sum() == len(front), "equal ones count once"
