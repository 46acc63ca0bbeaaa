"""What experts cost on a GPU, from its figures in conf/hardware (`hardware.py`): for planning and simulating without
one. On this machine they are measured instead (`measured_costs.py`).

Each cost is the larger of the operations at peak rate and the bytes at full bandwidth, times what is reached of
them in practice, plus a launch. These are bounds made plausible, no measurements: whatever follows from them is
labelled simulated.
"""

from __future__ import annotations

from typing import Literal

from haq_lab.int8.roofline import Hardware
from haq_lab.offload.costs import Costs, PiecewiseLinear
from haq_lab.offload.shape import Shape

Format = Literal["int8", "fp16", "bf16"]
BYTES = {"int8": 1, "fp16": 2, "bf16": 2}
LINK_REACHED = 0.82  # pinned copies reach 80-85 % of the link (a rule of thumb, unsourced)
REACHED = 0.6  # of peak operations and bandwidth (a rule of thumb, unsourced)
LAUNCH = 30e-6  # seconds for an expert's few kernels
HOST_OPERATIONS_PER_BYTE = 16.0  # int8 operations a second over bytes a second of a host's memory: AVX2 desktops
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def gpu_costs(hardware: Hardware, shape: Shape, host: Format = "int8", device: Format = "int8") -> Costs:
    """The costs of a model on a GPU whose experts lie in the host's memory as `host` and run as `device`.

    Where the two differ, a fetch includes the conversion on the device (dequantization on load). Where the GPU shares
    the host's memory, there is no link, and a fetch is a copy within it.
    """
    operations = hardware.int8_tops * 1e12 * (1.0 if device == "int8" else 0.5) * REACHED
    bandwidth = hardware.bandwidth_gbs * 1e9 * REACHED

    def on_device(weights: int, width: int) -> PiecewiseLinear:
        least = [max(2 * n * weights / operations, width * weights / bandwidth) + LAUNCH for n in TOKENS]
        return PiecewiseLinear(TOKENS, least)

    host_rate = hardware.host_gbs * 1e9 * REACHED
    in_place = [max(BYTES[host], 2 * n / HOST_OPERATIONS_PER_BYTE) * shape.expert / host_rate for n in TOKENS]
    moved = shape.expert * BYTES[host]
    link = bandwidth if hardware.link_gbs is None else hardware.link_gbs * 1e9 * LINK_REACHED
    conversion = 0.0 if BYTES[host] == BYTES[device] else (BYTES[host] + BYTES[device]) * shape.expert / bandwidth
    return Costs(
        fast=on_device(shape.expert, BYTES[device]),
        slow=PiecewiseLinear(TOKENS, in_place),
        fetch=PiecewiseLinear([moved], [moved / link + conversion + LAUNCH]),
        rest=on_device(shape.rest, BYTES[device]),
        outside=on_device(shape.outside, 2),
        expert_bytes=moved,
    )
