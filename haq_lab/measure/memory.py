"""Measure memory: the bytes of the weights, the memory that running the model takes, and the peak of the run.

Running is measured alone, on one prompt, after calibration and quantization have let their memory go. It counts from
what Python and the libraries take (`memory.libraries_bytes`), which is recorded on its own.
"""

from __future__ import annotations

import gc
import resource
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import psutil
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from haq_lab.data.windows import Windows
from haq_lab.int8.linear import parameter_count, weight_bytes
from haq_lab.measure.base import Study
from haq_lab.measure.prompts import PromptTexts, refuse_too_long
from haq_lab.measure.timing import generate_in_turn
from haq_lab.models.layerwise import LayeredModel
from haq_lab.utils.malloc import release_memory

PEAK = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
DECODED = 4  # tokens after the prompt; its prefill takes the most memory


class Resident(NamedTuple):
    """Bytes of this process in RAM.

    Attributes:
        private: Memory that only this process uses, such as weights and activations.
        shared: Pages of files, which processes share: libraries, and weights that are read in place.
    """

    private: int
    shared: int


@dataclass(frozen=True)
class Memory:
    """Measures the weights of the deployed model, the memory that running it takes, and the peak memory of the run.

    The bytes of the weights are counted from storages. For comparison, `memory.weights_fp16_bytes` is the size of the
    whole model in fp16, including offloaded experts. The peaks are of the process (RAM), and of torch's allocations on
    the model's GPU (0 without a GPU). `memory.running_bytes` is the peak while the model reads a prompt and decodes,
    beyond `memory.libraries_bytes`. It has two parts, `memory.running_private_bytes` and `memory.running_shared_bytes`.

    Args:
        prompt_tokens: Tokens in the prompt. It comes from the first text of `data`, or from the calibration text.
    """

    prompt_tokens: Annotated[int, Field(ge=1)] = 256

    evaluates: ClassVar[bool] = False
    deploys: ClassVar[bool] = True

    def load_prompts(self, model: LayeredModel, texts: PromptTexts) -> Windows:
        """Load the prompt (1, prompt_tokens) and its protocol stamp.

        Raises:
            UserError: The model has too few positions, or the text is too short or cannot be read.
        """
        setting = "measure.memory.prompt_tokens"
        refuse_too_long(setting, self.prompt_tokens, DECODED, model)
        return texts.load(model.tokenizer(), self.prompt_tokens, 1, setting)

    @torch.no_grad()
    def __call__(self, study: Study) -> dict[str, float]:
        """Return the bytes by metric. `study.prompts` must have the prompt of this measure."""
        study.progress("memory")
        device = next(study.whole.parameters()).device
        metrics: dict[str, float] = {
            "memory.weights_bytes": weight_bytes(study.whole),
            "memory.weights_fp16_bytes": 2 * _count_weights(study.model),
        }
        gc.collect()
        release_memory()
        peak, peak_on_device = peak_rss(), _peak_on(device)
        exact = reset_peaks(device)
        with study.aside():
            generate_in_turn([study.whole], study.prompts[self].tokens.to(device), DECODED)
        after, base = resident(), libraries()
        running = peak_rss() if exact else sum(after)  # without a reset, the peak would be that of the whole run
        shared = max(after.shared - base.shared, 0)
        metrics |= {
            "memory.libraries_bytes": sum(base),
            "memory.running_bytes": max(running - sum(base), 0),
            "memory.running_private_bytes": max(running - sum(base) - shared, 0),
            "memory.running_shared_bytes": shared,
            "memory.peak_rss_bytes": max(peak, peak_rss()),
            "memory.peak_device_bytes": max(peak_on_device, _peak_on(device)),
        }
        if device.type == "cuda":
            metrics["memory.running_device_bytes"] = _peak_on(device)
        return metrics


def _count_weights(model: LayeredModel) -> int:
    """Return the number of weights that the model had before it was quantised."""
    # Not by parameter_count: on the meta device there are no storages to tell apart, and layers have no ties.
    layers = (model.new_layer(index).parameters() for index in range(model.depth))
    return parameter_count(model.shell) + sum(weight.numel() for layer in layers for weight in layer)


def reset_peaks(device: torch.device | None = None) -> bool:
    """Start to count the peaks anew, because the jobs of a sweep can share a process.

    Args:
        device: Device of the run. If it is a GPU, the peak of its memory is reset too.

    Returns:
        Whether the system allows it for RAM.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Return the largest resident set of this process in bytes, since the last reset."""
    try:
        line = next(line for line in PEAK.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> Resident:
    """Return the bytes of this process in RAM now. All count as private where the system does not tell."""
    info = psutil.Process().memory_info()
    shared = getattr(info, "shared", 0)
    return Resident(info.rss - shared, shared)


@cache
def libraries() -> Resident:
    """Return the bytes that this process had in RAM at the first call: Python and the libraries.

    A run calls it before it loads its model. Later runs of the process use the same value.
    """
    return resident()


def _peak_on(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
