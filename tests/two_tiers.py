"""A small int8 model whose experts are in host memory and run on a device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import CalibrationPolicy, InputStatistics
from haq_lab.int8.backend import Backend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.offload.engine.engine import Engine
from haq_lab.offload.policies.path_model import PathModel, fit_path_model
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import Decide, make_policy
from haq_lab.offload.policies.prefetch import NextGate, NextOnPath
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.conversion import ConvertedTier
from haq_lab.offload.tiers.cuda_streams import Mark, Streams
from haq_lab.offload.tiers.pinned_host import HostTier, HostWriter
from haq_lab.offload.tiers.writer import TierWriter
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.base import ActivationChoice, Quantizer, Solution, nearest_solution
from haq_lab.quantizers.rtn import RTN
from haq_lab.routing.record import record_trace
from haq_lab.runtime.deploy import deploy

READY = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not READY, reason="needs an NVIDIA GPU that torch can use, and CuPy")]
NEAREST = RTN()
WINDOWS = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(1))


def decoded(whole: nn.Module, prompt: Tensor = WINDOWS[:1, :8], steps: int = 6) -> Tensor:
    """Return the logits after a prompt (1, t) and after each token that is decoded greedily, (steps, v)."""
    tokens, cache, logits = prompt, None, []
    for _ in range(steps):
        output = whole(tokens, cache=cache, use_cache=True)
        logits.append(output.logits[:, -1])
        tokens, cache = output.logits[:, -1:].argmax(-1), output.cache
    return torch.cat(logits)


class FourOrEightBits(RTN):
    """Rounds to nearest. The sign of a linear's first weight decides whether it has 4 bits in groups of 32, or 8."""

    def solve(self, weight: Tensor, statistics: InputStatistics | None, activation: ActivationChoice) -> Solution:
        return nearest_solution(weight, WeightFormat(4, 32) if float(weight[0, 0]) < 0 else WeightFormat())


DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]


def backend_on(device: str) -> Backend:
    """Return the backend of one of `DEVICES`."""
    return CpuBackend() if device == "cpu" else CudaBackend(share=True)


def finished(
    model: LayeredModel,
    add: Callable[[Any], object] = lambda layer: None,
    quantizer: Quantizer | None = NEAREST,
    backend: Backend | None = None,
) -> list[Any]:
    """Run a pass over the model and return its final layers. `add` is called with each layer."""
    layers: list[Any] = []

    def keep(index: int, layer: nn.Module) -> None:
        add(layer)
        layers.append(layer)

    sequential_pass(PassInputs(model, quantizer, backend or CpuBackend(), None, CalibrationPolicy(), {}), keep)
    return layers


class SeparateMemoryStreams(Streams):
    """Fake streams of a device with separate memory. They count copies and record pinned memory.

    Args:
        device: Device of the arena.
    """

    separate_memory = True

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.locked: list[int] = []
        self.copies = self.drained = 0

    @contextmanager
    def copying(self, after: Mark) -> Iterator[None]:
        self.copies += 1
        yield

    def drain(self) -> None:
        self.drained = self.copies

    def pin(self, memory: Tensor) -> None:
        self.locked.append(memory.nbytes)

    def unpin(self, memory: Tensor) -> None:
        assert self.drained == self.copies, "copies from it may still be running"
        self.locked.remove(memory.nbytes)


class TwoTiers:
    """Builds engines for a small model, and knows the expected output.

    Args:
        backend: Backend that computes.
        streams: Streams of its device.
        folder: Folder of the model. None is a tiny Mixtral of three layers and 24 experts.
        steps: Number of decoding steps after the prompt, the prompt included.
        quantizer: Quantizer of the model.

    Attributes:
        depth: Number of layers of the model.
        expected: Logits with all experts on the device and without an engine.
    """

    def __init__(
        self,
        backend: Backend,
        streams: Streams,
        folder: Path | None = None,
        steps: int = 5,
        quantizer: Quantizer = NEAREST,
    ):
        self.backend, self.streams, self.steps, self.quantizer = backend, streams, steps, quantizer
        self._folder = folder or TinyModel("mixtral", layers=3).folder()
        self.depth = self._model().depth
        self.prompt = torch.randint(0, 257, (1, 12), generator=torch.Generator().manual_seed(3))
        windows = torch.randint(0, 257, (2, 64), generator=torch.Generator().manual_seed(1))
        self.profile = record_trace(self._model(), windows, "random")
        model = self._model()
        self.expected = self.generate(deploy(model.assemble(self._layers(model)), model, backend))

    @cached_property
    def path_model(self) -> PathModel:
        """Path model for the rule `haq`."""
        return fit_path_model(self.profile, steps=50)

    def tier(self, layers: list[Any]) -> HostTier:
        """Move the layers' experts to host memory."""
        with HostWriter(self.depth, self.streams) as writer:
            for layer in layers:
                writer.add(layer.mlp.experts)
            return writer.open()

    def engine(
        self,
        rule: Any = "lru",
        slots: int = 6,
        scope: Any = "global",
        spare: int = 2,
        prefetch: str | None = None,
        decide: Decide | None = None,
        writer: TierWriter | None = None,
    ) -> tuple[Engine, nn.Module]:
        """Return an engine and its model, which is built anew because deploying moves the weights.

        `decide` names the missing experts that run on the CPU. The slow tier is that of `writer`, or in host memory.
        """
        model = self._model()
        layers = self._layers(model)
        writer = writer or HostWriter(self.depth, self.streams, None if decide is None else CpuBackend())
        for layer in layers:
            writer.add(layer.mlp.experts)
        tier: SlowTier = writer.open()
        whole = deploy(model.assemble(layers), model, self.backend)
        if (relayout := writer.relayout(layers[0].mlp.experts)) is not None:
            tier = ConvertedTier(tier, relayout, self.streams.device)
        start, path_model = place("frequency", self.profile, slots), self.path_model if rule == "haq" else None
        policy = make_policy(rule, start, self.profile, scope, path_model, tier.layouts.index)
        policy.decide = decide or policy.decide
        guess = {None: None, "path": NextOnPath(self.profile), "gate": NextGate([layer.mlp.gate for layer in layers])}
        guesses = min(2, spare - 1) if prefetch else 0
        engine = Engine(tier, policy, spare, guess[prefetch], guesses, streams=self.streams)
        assert model.family.moe is not None
        engine.attach(layers, model.family.moe)
        return engine, whole

    def generate(self, whole: nn.Module) -> Tensor:
        """Return the logits of a prompt and of the tokens decoded after it."""
        return decoded(whole, self.prompt.to(self.backend.device), self.steps)

    def _model(self) -> LayeredModel:
        return LayeredModel(self._folder)

    def _layers(self, model: LayeredModel) -> list[Any]:
        return finished(model, quantizer=self.quantizer, backend=self.backend)
