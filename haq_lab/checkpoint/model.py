"""Load quantised checkpoints layer by layer into int8 modules.

model = QuantizedModel(Path("checkpoints/opt"), ReferenceBackend())
layer = model.load_layer(0)
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from haq_lab.checkpoint.layer_tensors import int8_layer, read_layer
from haq_lab.checkpoint.manifest import REST, ROUTING, Manifest, layer_file
from haq_lab.int8.backend import Backend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import ModelSource
from haq_lab.routing.trace import Trace
from haq_lab.storage.safetensors_file import read_shard
from haq_lab.utils.errors import UserError


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint that was written with `checkpoint.dir=DIR`.

    Args:
        path: Folder of the checkpoint.
    """

    path: str

    @property
    def label(self) -> str:
        return Path(self.path).name

    def folder(self) -> Path:
        folder = Path(self.path).expanduser()
        Manifest.read(folder, "model.path")
        return folder


class QuantizedModel(LayeredModel):
    """A quantised checkpoint that is read layer by layer.

    Weights are never converted to full precision. Every tensor is checked against its hash when it is read.

    Args:
        folder: The checkpoint folder.
        backend: Backend that computes the int8 linears.

    Raises:
        UserError: A file is missing, damaged or renamed. The message names the file and the tensor.
    """

    quantized = True

    def __init__(self, folder: Path, backend: Backend):
        self.manifest = Manifest.read(folder)
        self.backend = backend
        self.manifest.check_files(folder)
        super().__init__(folder)
        if has_int8_head(folder):
            self.quantize_head(backend)

    def read_outer_tensors(self) -> dict[str, Tensor]:
        return read_shard(self.folder, self.manifest.shard(self.folder, REST))[0]

    def routing(self) -> Trace | None:
        """Return the routing trace of the calibration pass, or None if the checkpoint has none."""
        return Trace.open(self.folder / ROUTING) if ROUTING in self.manifest.files else None

    def load_layer(self, index: int) -> nn.Module:
        """Return decoder layer `index` in int8.

        Raises:
            UserError: The layer's file is damaged or does not fit the config.
        """
        file = layer_file(index)
        stored, schemes = read_layer(self.folder, self.manifest.shard(self.folder, file))
        prefix = f"{self.family.layers}.{index}."
        for name in stored:
            if not name.startswith(prefix):
                raise UserError(
                    f"checkpoint: {self.folder / file}: tensor '{name}' does not belong to layer {index}. "
                    "Write the checkpoint again."
                )
        tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        schemes = {name.removeprefix(prefix): scheme for name, scheme in schemes.items()}
        return int8_layer(self, index, tensors, schemes, self.backend, str(self.folder / file))


def has_int8_head(folder: Path) -> bool:
    """Return whether `folder` is a quantised checkpoint with an int8 head (`quantizer.lm_head=true`).

    The file stores the head in float; loading quantises it.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("quantization_config", {}).get("int8_head", False))


def open_model(source: ModelSource, backend: Backend) -> LayeredModel:
    """Open the model of a source for reading layer by layer.

    Args:
        source: A model source. A `QuantizedCheckpoint` gives int8 layers, any other source gives float layers.
        backend: Backend of int8 layers. It is not used for float layers.

    Raises:
        UserError: The source or its folder is not usable.
    """
    if isinstance(source, QuantizedCheckpoint):
        return QuantizedModel(source.folder(), backend)
    return LayeredModel(source.folder(), allow_nonfinite=getattr(source, "allow_nonfinite", False))
