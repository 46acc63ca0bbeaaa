"""Measure memory: the bytes of the weights, and the peak memory of the run."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from haq_lab.int8.linear import parameter_count, weight_bytes
from haq_lab.measure.base import Study
from haq_lab.models.layerwise import LayeredModel

PEAK = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Measures the weights of the deployed model and the peak memory of the run.

    The bytes of the weights are counted from storages. For comparison, `memory.weights_fp16_bytes` is the size of the
    whole model in fp16, including offloaded experts. The peaks are of the process (RAM), and of torch's allocations on
    the model's GPU (0 without a GPU).
    """

    evaluates: ClassVar[bool] = False
    deploys: ClassVar[bool] = True

    def __call__(self, study: Study) -> dict[str, float]:
        """Return the bytes by metric."""
        device = next(study.whole.parameters()).device
        return {
            "memory.weights_bytes": weight_bytes(study.whole),
            "memory.weights_fp16_bytes": 2 * _count_weights(study.model),
            "memory.peak_rss_bytes": peak_rss(),
            "memory.peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        }


def _count_weights(model: LayeredModel) -> int:
    """Return the number of weights that the model had before it was quantised."""
    # Not by parameter_count: on the meta device there are no storages to tell apart, and layers have no ties.
    layers = (model.new_layer(index).parameters() for index in range(model.depth))
    return parameter_count(model.shell) + sum(weight.numel() for layer in layers for weight in layer)


def reset_peaks(device: torch.device | None = None) -> None:
    """Start to count the peaks anew, because the jobs of a sweep can share a process.

    The peak of RAM is reset only if the system allows it.

    Args:
        device: Device of the run. If it is a GPU, the peak of its memory is reset too.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        RESET.write_text("5")


def peak_rss() -> int:
    """Return the largest resident set of this process in bytes, since the last reset."""
    try:
        line = next(line for line in PEAK.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
