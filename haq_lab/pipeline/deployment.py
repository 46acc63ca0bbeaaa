"""Make the model that runs from its quantised decoder layers, and load a checkpoint this way.

A run collects the layers that its pass finishes. `load_checkpoint` reads them from a folder. Both use `Deployment`, so
a loaded checkpoint computes the same bits as the run that measured it.

    whole, model = load_checkpoint(Path("checkpoints/smol"), CpuBackend())
    whole.generate(**model.tokenizer()("Once upon a time", return_tensors="pt"))
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from haq_lab.checkpoint.manifest import FILE, ROUTING
from haq_lab.checkpoint.model import QuantizedModel, open_model
from haq_lab.int8.backend import Backend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import ModelSource
from haq_lab.result_cache.store import Store
from haq_lab.routing.record import record_trace
from haq_lab.routing.trace import Trace
from haq_lab.runtime.deploy import deploy
from haq_lab.utils.atomic_files import sha256
from haq_lab.utils.paths import cache_folder

if TYPE_CHECKING:
    from haq_lab.calibration.dataset import Calibration
    from haq_lab.offload.session import OffloadSession
    from haq_lab.offload.settings import Offload
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
    folder: Path,
    backend: Backend,
    report: Report | None = None,
    offload: Offload | None = None,
    calibration: Calibration | None = None,
) -> tuple[PreTrainedModel, QuantizedModel]:
    """Load a quantised checkpoint as a transformers model.

    Every tensor and file is checked against its hash. With offloading, the model has the attribute `offload`, an
    `OffloadSession`. It ends with the model.

    Args:
        folder: A folder that `checkpoint.dir` or `haq_lab.quantize` has written.
        backend: Backend that computes the int8 linears.
        report: Called with a line that says why the native decoder is not used for some layers.
        offload: Settings of offloading. If None, all experts stay in memory.
        calibration: Text to record the routing profile on, if neither the checkpoint nor `offload.profile` has one.

    Returns:
        The model, ready to run, and its description.

    Raises:
        UserError: The folder is not a checkpoint, a file is missing or damaged, or offloading does not suit the model.
    """
    model = QuantizedModel(folder, backend, contiguous=offload is None)  # offloading frees the memory of experts
    session = None if offload is None else _open_session(offload, model, calibration)
    try:
        deployment = Deployment(model, backend, session, report)
        for layer in model.load_layers():
            deployment.add(layer)
        whole = cast(PreTrainedModel, deployment.finish())
    except BaseException:
        if session is not None:
            session.close()
        raise
    if session is not None:
        whole.offload = session  # type: ignore[assignment]
        # Not `whole`: `from_pretrained` moves its modules to another model.
        weakref.finalize(whole.get_submodule(model.family.layers), session.close)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        whole.generation_config = GenerationConfig.from_pretrained(folder)
    return whole, model


@torch.no_grad()
def load_full_precision(source: ModelSource, backend: Backend) -> nn.Module:
    """Load a model without quantization, as a run with `quantizer=none` runs it.

    Args:
        source: The model's source. Not a quantised checkpoint.
        backend: The backend of the run.

    Returns:
        The model, ready to run.
    """
    model = open_model(source, backend)
    deployment = Deployment(model, backend)
    for index in range(model.depth):
        deployment.add(model.load_layer(index))
    return deployment.finish()


def load_with_options(
    folder: Path, backend: Backend, offload: str | None, settings: Mapping[str, Any]
) -> tuple[PreTrainedModel, QuantizedModel]:
    """Load a checkpoint as `load_checkpoint` does, with offloading by the name of an option.

    Args:
        folder: Folder of the checkpoint.
        backend: Backend that computes the int8 linears.
        offload: An option of the group `offload`. If it is None and there are no settings, all experts stay in memory.
        settings: Settings of offloading by name.

    Raises:
        UserError: As `load_checkpoint` and `make_offload`.

    Example:
        >>> whole, model = load_with_options(Path("checkpoints/smol_moe"), CpuBackend(), "haq", {"budget": "40%"})
    """
    if offload is None and not settings:
        return load_checkpoint(folder, backend)
    from haq_lab.config.offloading import make_offload  # composes a config, which takes 0.4 s

    chosen, calibration = make_offload(offload or "none", settings)
    return load_checkpoint(folder, backend, offload=chosen, calibration=calibration)


def _open_session(offload: Offload, model: QuantizedModel, calibration: Calibration | None) -> OffloadSession:
    """Start offloading with an expert file in the cache folder and the checkpoint's routing profile."""
    from haq_lab.offload.session import OffloadSession
    from haq_lab.offload.tiers.cuda_streams import make_streams

    offload.must_suit(model.backend.device, quantized=True)
    folder = cache_folder() / "experts" / sha256(model.folder / FILE)
    streams = make_streams(model.backend.device)
    session = OffloadSession(offload, None, model, folder, Store(), streams, reuse=True)
    try:
        if offload.profile is None:
            session.use_profile(_routing_profile(model, folder / ROUTING, calibration))
    except BaseException:
        session.close()
        raise
    return session


def _routing_profile(model: QuantizedModel, recorded: Path, calibration: Calibration | None) -> Trace:
    """Return the checkpoint's routing trace. If it has none, record one once and store it at `recorded`."""
    if (trace := model.routing()) is not None:
        return trace
    if not recorded.is_file():
        assert calibration is not None, "a checkpoint without a routing trace needs a calibration text"
        record_trace(model, calibration.load(model.tokenizer()).tokens, calibration.text).save(recorded)
    return Trace.open(recorded)
