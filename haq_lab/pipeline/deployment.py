"""Make the model that runs from its quantised decoder layers, and load a checkpoint this way.

A run collects the layers that its pass finishes. `load_checkpoint` reads them from a folder. Both use `Deployment`, so
a loaded checkpoint computes the same bits as the run that measured it.

    whole, model = load_checkpoint(Path("checkpoints/smol"), CpuBackend())
    whole.generate(**model.tokenizer()("Once upon a time", return_tensors="pt"))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.backend import Backend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.runtime.deploy import deploy

if TYPE_CHECKING:
    from haq_lab.offload.session import OffloadSession
    from haq_lab.routing.choices import Routing

Report = Callable[[str], None]


class Deployment:
    """Collects the decoder layers of a model. With offloading, their experts leave memory layer by layer.

    Args:
        model: The model that the layers belong to.
        backend: Backend of the int8 linears.
        offload: The offloading session, or None if all experts stay in memory.
        report: Called with a line for each part of the method that is not used, and why.
    """

    def __init__(
        self, model: LayeredModel, backend: Backend, offload: OffloadSession | None = None, report: Report | None = None
    ):
        self.model, self.backend, self.offload, self._report = model, backend, offload, report
        self._layers: list[nn.Module] = []

    def add(self, layer: nn.Module) -> None:
        """Add the next decoder layer, in its final form."""
        if self.offload is not None:
            self.offload.add(layer)
        self._layers.append(layer)

    def finish(self, routing: Routing | None = None, calibration: Tensor | None = None, text: str = "") -> nn.Module:
        """Return the whole model, ready to run.

        Args:
            routing: The router's choices on the calibration text, if they were recorded. Only offloading uses them.
            calibration: Token windows (n, t) to record the choices on, if there is no other source.
            text: Name of the calibration text.
        """
        offload = self.offload if self._layers else None
        if offload is not None:
            offload.find_profile(routing, calibration, text)
        whole = deploy(self.model.assemble(self._layers), self.model, self.backend, self._report)
        if offload is not None:  # after `deploy`, which moves the weights that are in memory
            offload.engage(self._layers)
            if offload.limitation is not None and self._report is not None:
                self._report(f"offload.eviction: {offload.limitation}")
        return whole


@torch.no_grad()
def load_checkpoint(
    folder: Path, backend: Backend, report: Report | None = None
) -> tuple[PreTrainedModel, QuantizedModel]:
    """Load a quantised checkpoint as a transformers model.

    Every tensor and file is checked against its hash.

    Args:
        folder: A folder that `checkpoint.dir` or `haq_lab.quantize` has written.
        backend: Backend that computes the int8 linears.
        report: Called with a line that says why the native decoder is not used for some layers.

    Returns:
        The model, ready to run, and its description.

    Raises:
        UserError: The folder is not a checkpoint, or a file is missing or damaged.
    """
    model = QuantizedModel(folder, backend)
    deployment = Deployment(model, backend, report=report)
    for index in range(model.depth):
        deployment.add(model.load_layer(index))
    whole = cast(PreTrainedModel, deployment.finish())
    if (folder / GENERATION_CONFIG_NAME).is_file():
        whole.generation_config = GenerationConfig.from_pretrained(folder)
    return whole, model
