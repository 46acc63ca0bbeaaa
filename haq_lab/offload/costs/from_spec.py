"""Derive the costs of experts from a machine's specification (`conf/hardware`), without the machine itself.

A run on this machine measures the costs instead (`measured.py`). Each cost is the larger of operations at peak rate and
bytes at full bandwidth, divided by the share that is reached in practice, plus a kernel launch. These are estimates and
not measurements, so all results that follow from them are labelled as simulated.
"""

from __future__ import annotations

from haq_lab.hardware.spec import Hardware
from haq_lab.offload.costs.cost_model import Costs, PiecewiseLinear
from haq_lab.offload.costs.model_shape import Shape
from haq_lab.offload.tiers.formats import Format

BYTES = {"int8": 1, "fp16": 2, "bf16": 2}
LINK_REACHED = 0.82  # share of the link that pinned copies reach: 80-85 % (a rule of thumb without a source)
REACHED = 0.6  # share of peak operations and bandwidth (a rule of thumb without a source)
LAUNCH = 30e-6  # seconds to launch an expert's kernels
HOST_OPERATIONS_PER_BYTE = 16.0  # int8 operations per byte of host memory bandwidth, for AVX2 desktops
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def machine_costs(hardware: Hardware, shape: Shape, host: Format = "int8", device: Format = "int8") -> Costs:
    """Return the costs of a model on a machine.

    If the two formats differ, a fetch includes the conversion on the device (dequantization on load). If a GPU shares
    the host's memory, a fetch is a copy in that memory. If there is no GPU, the slow tier is the disk. An expert in
    place is then read and computed, and the figures are used as they are, because they were measured.

    Args:
        hardware: Specification of the machine.
        shape: Sizes of the model.
        host: Format of the experts in the slow tier.
        device: Format of the experts in the fast tier.
    """
    reached, link_reached = (1.0, 1.0) if hardware.from_disk else (REACHED, LINK_REACHED)
    operations = hardware.int8_tops * 1e12 * (1.0 if device == "int8" else 0.5) * reached
    bandwidth = hardware.bandwidth_gbs * 1e9 * reached

    def on_device(weights: int, width: float) -> PiecewiseLinear:
        estimates = [max(2 * n * weights / operations, width * weights / bandwidth) + LAUNCH for n in TOKENS]
        return PiecewiseLinear(TOKENS, estimates)

    widths = BYTES | {"int8": shape.quantized_bytes}
    fast = on_device(shape.expert, widths[device])
    moved = round(shape.expert * widths[host])
    link = bandwidth if hardware.link_gbs is None else hardware.link_gbs * 1e9 * link_reached
    host_rate = hardware.host_gbs * 1e9 * reached
    in_place = [max(widths[host], 2 * n / HOST_OPERATIONS_PER_BYTE) * shape.expert / host_rate for n in TOKENS]
    if hardware.from_disk:
        in_place = [moved / link + fast(n) for n in TOKENS]
    conversion = 0.0 if widths[host] == widths[device] else (widths[host] + widths[device]) * shape.expert / bandwidth
    return Costs(
        fast=fast,
        slow=PiecewiseLinear(TOKENS, in_place),
        fetch=PiecewiseLinear([0, moved], [conversion + LAUNCH, moved / link + conversion + LAUNCH]),
        rest=on_device(shape.rest, widths[device]),
        outside=on_device(shape.outside, shape.head_bytes),
        expert_bytes=moved,
        from_disk=hardware.from_disk,
    )
