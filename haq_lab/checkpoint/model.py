"""A quantised checkpoint as a model that is read a layer at a time: bytes go straight into int8 modules."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from haq_lab.checkpoint.layer_tensors import int8_layer
from haq_lab.checkpoint.manifest import REST, Manifest, layer_file
from haq_lab.int8.backend import Backend
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import ModelSource
from haq_lab.storage.safetensors_file import read_shard
from haq_lab.utils.errors import UserError


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint that `checkpoint.dir=DIR` wrote.

    Args:
        path: Its folder.
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
    """The layers of a quantised checkpoint, computing on `backend`.

    No weight is ever held at full precision. Every tensor is checked against its hash as it is read.

    Raises:
        UserError: A file is missing, damaged, renamed or not ours; the message names it, and the tensor.
    """

    quantized = True

    def __init__(self, folder: Path, backend: Backend):
        self.manifest = Manifest.read(folder)
        self.backend = backend
        for file in self.manifest.files:
            self.manifest.check_file(folder, file)
        super().__init__(folder)
        if has_int8_head(folder):
            self.quantize_head(backend)

    def outside(self) -> dict[str, Tensor]:
        return read_shard(self.folder, self.manifest.shard(self.folder, REST))[0]

    def load_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` in int8."""
        file = layer_file(index)
        stored, metadata = read_shard(self.folder, self.manifest.shard(self.folder, file))
        prefix = f"{self.family.layers}.{index}."
        for name in stored:
            if not name.startswith(prefix):
                raise UserError(f"checkpoint: {self.folder / file}: tensor '{name}' is not of layer {index}")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        schemes = {name.removeprefix(prefix): scheme for name, scheme in json.loads(metadata["schemes"]).items()}
        return int8_layer(self, index, tensors, schemes, self.backend, str(self.folder / file))


def has_int8_head(folder: Path) -> bool:
    """Return whether `folder` is a quantised checkpoint with an int8 head (`quantizer.lm_head=true`).

    The file stores the head in float; loading quantises it.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("quantization_config", {}).get("int8_head", False))


def open_model(source: ModelSource, backend: Backend) -> LayeredModel:
    """The model of a source: one that was quantised here, or one that is to be."""
    if isinstance(source, QuantizedCheckpoint):
        return QuantizedModel(source.folder(), backend)
    return LayeredModel(source.folder())
