"""A tiny Mixtral in int8 whose experts lie in the host's memory and compute on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import Policy
from haq_lab.int8.backend import Backend
from haq_lab.int8.deploy import deploy
from haq_lab.models.layered import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.offload.engine import Engine
from haq_lab.offload.host_tier import HostTier, HostWriter
from haq_lab.offload.path_model import fit_path_model
from haq_lab.offload.placement import place
from haq_lab.offload.policy import make_policy
from haq_lab.offload.prefetch import NextGate, NextOnPath
from haq_lab.offload.record import record_trace
from haq_lab.offload.streams import Streams
from haq_lab.onepass import one_pass
from haq_lab.quantizers.rtn import RTN


class TwoTiers:
    """Args:
    backend: Computes, on its device.
    streams: Of that device.
    layers: Of the model.

    Attributes:
        expected: Logits with all experts on the device, no engine.
    """

    def __init__(self, backend: Backend, streams: Streams, layers: int = 3, steps: int = 5):
        self.backend, self.streams, self.depth, self.steps = backend, streams, layers, steps
        self.prompt = torch.randint(0, 257, (1, 12), generator=torch.Generator().manual_seed(3))
        windows = torch.randint(0, 257, (2, 64), generator=torch.Generator().manual_seed(1))
        self.profile = record_trace(self._model(), windows, "random")
        self.path_model = fit_path_model(self.profile, steps=50)
        model = self._model()
        self.expected = self.generate(deploy(model.assemble(self._layers(model)), model, backend))

    def tier(self, layers: list[Any]) -> HostTier:
        """The layers' experts, out of them and in the host's memory."""
        with HostWriter(self.depth, self.streams) as writer:
            for layer in layers:
                writer.add(layer.mlp.experts)
            return writer.open()

    def engine(
        self, rule: Any = "lru", slots: int = 6, scope: Any = "global", spare: int = 2, prefetch: str | None = None
    ) -> tuple[Engine, nn.Module]:
        """An engine at work in a whole model, which is new each time: deploying moves its weights."""
        model = self._model()
        layers = self._layers(model)
        tier = self.tier(layers)
        whole = deploy(model.assemble(layers), model, self.backend)
        policy = make_policy(rule, place("frequency", self.profile, slots), self.profile, scope, self.path_model)
        guess = {None: None, "path": NextOnPath(self.profile), "gate": NextGate([layer.mlp.gate for layer in layers])}
        guesses = min(2, spare - 1) if prefetch else 0
        engine = Engine(tier, policy, spare, guess[prefetch], guesses, streams=self.streams)
        assert model.family.moe is not None
        engine.attach(layers, model.family.moe)
        return engine, whole

    def generate(self, whole: nn.Module) -> Tensor:
        """Logits of a prompt and of tokens decoded after it."""
        tokens, cache, logits = self.prompt.to(self.backend.device), None, []
        for _ in range(self.steps):
            output = whole(tokens, cache=cache, use_cache=True)
            logits.append(output.logits[:, -1])
            tokens, cache = output.logits[:, -1:].argmax(-1), output.cache
        return torch.cat(logits)

    def _model(self) -> LayeredModel:
        return LayeredModel(TinyModel("mixtral", layers=self.depth).folder())

    def _layers(self, model: LayeredModel) -> list[Any]:
        layers: list[Any] = []
        one_pass(model, RTN(), self.backend, None, Policy(), {}, lambda index, layer: layers.append(layer))
        return layers
