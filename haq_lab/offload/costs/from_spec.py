"""What experts cost on a machine, from its figures in conf/hardware (`hardware.py`): for planning and simulating
without having it. In a run on this machine they are timed instead (`measured_costs.py`).

Each cost is the larger of the operations at peak rate and the bytes at full bandwidth, times what is reached of
them in practice, plus a launch. These are bounds made plausible, no measurements: whatever follows from them is
labelled simulated.
"""

from __future__ import annotations

from haq_lab.hardware.spec import Hardware
from haq_lab.offload.costs.cost_model import Costs, PiecewiseLinear
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.tiers.formats import Format

BYTES = {"int8": 1, "fp16": 2, "bf16": 2}


LINK_REACHED = 0.82  # pinned copies reach 80-85 % of the link (a rule of thumb, unsourced)


REACHED = 0.6  # of peak operations and bandwidth (a rule of thumb, unsourced)


LAUNCH = 30e-6  # seconds for an expert's few kernels


HOST_OPERATIONS_PER_BYTE = 16.0  # int8 operations a second over bytes a second of a host's memory: AVX2 desktops


TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def machine_costs(hardware: Hardware, shape: Shape, host: Format = "int8", device: Format = "int8") -> Costs:
    """The costs of a model on a machine whose experts lie in the slow tier as `host` and run as `device`.

    Where the two differ, a fetch includes the conversion on the device (dequantization on load). Where a GPU shares
    the host's memory, there is no link, and a fetch is a copy within it. Where there is no GPU, the slow tier is the
    disk, an expert in place is read and computed, and the figures are what was reached.
    """
    reached, link_reached = (1.0, 1.0) if hardware.from_disk else (REACHED, LINK_REACHED)
    operations = hardware.int8_tops * 1e12 * (1.0 if device == "int8" else 0.5) * reached
    bandwidth = hardware.bandwidth_gbs * 1e9 * reached

    def on_device(weights: int, width: int) -> PiecewiseLinear:
        least = [max(2 * n * weights / operations, width * weights / bandwidth) + LAUNCH for n in TOKENS]
        return PiecewiseLinear(TOKENS, least)

    fast = on_device(shape.expert, BYTES[device])
    moved = shape.expert * BYTES[host]
    link = bandwidth if hardware.link_gbs is None else hardware.link_gbs * 1e9 * link_reached
    host_rate = hardware.host_gbs * 1e9 * reached
    in_place = [max(BYTES[host], 2 * n / HOST_OPERATIONS_PER_BYTE) * shape.expert / host_rate for n in TOKENS]
    if hardware.from_disk:
        in_place = [moved / link + fast(n) for n in TOKENS]
    conversion = 0.0 if BYTES[host] == BYTES[device] else (BYTES[host] + BYTES[device]) * shape.expert / bandwidth
    return Costs(
        fast=fast,
        slow=PiecewiseLinear(TOKENS, in_place),
        fetch=PiecewiseLinear([moved], [moved / link + conversion + LAUNCH]),
        rest=on_device(shape.rest, BYTES[device]),
        outside=on_device(shape.outside, shape.head_bytes),
        expert_bytes=moved,
        from_disk=hardware.from_disk,
    )
