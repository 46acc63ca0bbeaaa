"""Plan a deployment: simulate every format, placement and budget of a model on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pandas as pd

from haq_lab.hardware.spec import Hardware
from haq_lab.offload.costs.cost_model import Predictor
from haq_lab.offload.costs.from_spec import BYTES, machine_costs
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.policies.path_model import fit_path_model
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.offload.simulate.simulator import Simulator
from haq_lab.offload.tiers.formats import Format
from haq_lab.routing.trace import Trace

FORMATS: tuple[tuple[Format, Format], ...] = (("int8", "int8"), ("int8", "fp16"), ("bf16", "fp16"))
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
CACHES = ("none", "haq")
CONTEXT = 512 * 2**20  # bytes that a GPU's driver and allocator take for themselves


def plan(
    hardware: Hardware,
    shape: Shape,
    profile: Trace,
    test: Trace,
    context: int = 2048,
    tokens: int = 256,
    shares: Sequence[float] = SHARES,
    finished: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Simulate every combination of format, placement, eviction rule and budget.

    Args:
        hardware: The machine to simulate.
        shape: Sizes of the model.
        profile: Calibration trace, for placement and prediction.
        test: Trace to simulate.
        context: Number of tokens in the KV cache on the GPU.
        tokens: Number of tokens of the test trace to simulate.
        shares: Shares of all experts that are resident.
        finished: Called after each simulation.

    Returns:
        One row a combination: the formats, placement, eviction rule, slots, `memory_bytes` of the GPU, `simulated_ms`
        of a decoded token and its standard deviation, whether it `fits` the GPU, and whether it is on the `pareto`
        front.
    """
    model = fit_path_model(profile)
    rows = []
    placed = {
        (rule, share): place(rule, profile, round(share * shape.layers * shape.experts))
        for rule, share in product(("frequency", "two_stage"), shares)
    }
    for (host, device), (rule, share), cache in product(FORMATS, placed, CACHES):
        costs = machine_costs(hardware, shape, host, device)
        policy = make_policy(cache, placed[rule, share], profile, "global", model)
        policy.decide = Predictor(costs).decide
        metrics = Simulator(costs, policy).run(test, tokens).metrics("plan")
        memory = fixed_bytes(shape, device, context) + policy.slots * shape.expert * BYTES[device]
        row = {"host_format": host, "device_format": device, "placement": rule, "cache": cache, "slots": policy.slots}
        row |= {"memory_bytes": memory, "fits": memory <= hardware.memory_gb * 1e9}
        name = "simulated.plan.latency.decode_ms_per_token"
        rows.append(row | {"simulated_ms": metrics[f"{name}.mean"], "simulated_std_ms": metrics[f"{name}.std"]})
        finished()
    return mark_pareto(pd.DataFrame(rows))


def fixed_bytes(shape: Shape, device: Format, context: int) -> int:
    """Return the GPU memory in bytes that does not depend on the experts.

    It consists of the other weights, embedding and head, the KV cache and workspace of `context` tokens, and the
    driver's memory.
    """
    weights = shape.layers * shape.rest * BYTES[device] + shape.tables_bytes
    return weights + 2 * (shape.kv_per_token + shape.work_per_token) * context + CONTEXT


def mark_pareto(table: pd.DataFrame, memory: str = "memory_bytes", cost: str = "simulated_ms") -> pd.DataFrame:
    """Add the column `pareto`: no other row is lower in both columns, `memory` and `cost`."""
    order = table.sort_values([memory, cost])
    best = order[cost].cummin()
    front = order[cost].eq(best) & ~best.duplicated()
    return table.assign(pareto=front.reindex(table.index))
