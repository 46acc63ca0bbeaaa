"""The policy's clock, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from haq_lab.errors import UserError
from haq_lab.offload.path_model import fit_path_model
from haq_lab.offload.placement import place
from haq_lab.offload.policy import make_policy


@pytest.mark.parametrize("rule", ["lru", "lfu", "moe_infinity", "haq"])
def test_a_trace_in_two_parts_is_the_trace(make_trace, rule):
    """Time goes on from one replay to the next: an expert's last use never lies in the future."""
    trace = make_trace(tokens=400, sequences=4)
    resident, model = place("frequency", trace, 12), fit_path_model(trace, steps=20)
    once, twice = (make_policy(rule, resident, trace, path_model=model) for _ in range(2))
    whole = once.replay(trace)
    parts = [twice.replay(trace.part(part)) for part in (slice(0, 3), slice(3, 4))]
    assert sum(part.fetched for part in parts) == whole.fetched
    np.testing.assert_array_equal(once.resident, twice.resident)


def test_a_trace_of_another_model_is_refused(make_trace):
    """Compiled code checks no bounds: a larger trace would read and write past the residency map."""
    policy = make_policy("lru", place("uniform", make_trace(), 8), make_trace())
    for other in (make_trace(layers=5), make_trace(experts=9)):
        with pytest.raises(UserError, match="where 4 and 8 are wanted"):
            policy.replay(other)
