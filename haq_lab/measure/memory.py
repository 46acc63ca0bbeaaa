"""Measure the memory of the deployed weights, and the peak memory of the process."""

from __future__ import annotations

import resource
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
    """Bytes of the deployed model's weights, and the peak memory of the run.

    The weights are counted from their storages. `memory.weights_fp16_bytes` is the size of the whole model in fp16,
    offloaded experts included. Peaks are those of RAM and of torch's allocations on the GPU.
    """

    evaluates: ClassVar[bool] = False
    deploys: ClassVar[bool] = True

    def __call__(self, study: Study) -> dict[str, float]:
        return {
            "memory.weights_bytes": weight_bytes(study.whole),
            "memory.weights_fp16_bytes": 2 * _entries(study.model),
            "memory.peak_rss_bytes": peak_rss(),
            "memory.peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        }


def _entries(model: LayeredModel) -> int:
    """Return the number of weights that the model had before it was quantised."""
    # Not `parameter_count`: meta tensors have no storages, and the weights of a layer are never tied.
    layers = (model.new_layer(index).parameters() for index in range(model.depth))
    return parameter_count(model.shell) + sum(weight.numel() for layer in layers for weight in layer)


def reset_peaks() -> None:
    """Reset the peaks, if the system allows it. The jobs of a sweep share a process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        RESET.write_text("5")
    except OSError:
        return


def peak_rss() -> int:
    """Return the largest resident set of this process in bytes, since the last reset."""
    try:
        line = next(line for line in PEAK.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
