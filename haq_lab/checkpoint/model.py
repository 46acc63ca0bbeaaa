"""Load quantised checkpoints layer by layer into int8 modules.

model = QuantizedModel(Path("checkpoints/opt"), ReferenceBackend())
layer = model.load_layer(0)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from haq_lab.checkpoint.layer_tensors import LayerContent, int8_layer, read_formats, read_forms, read_layer
from haq_lab.checkpoint.manifest import REST, ROUTING, Manifest, layer_file
from haq_lab.hardware.huge_pages import prefer_huge_pages
from haq_lab.int8.backend import Backend
from haq_lab.int8.weight_format import INT8, WeightFormat
from haq_lab.models.families.family import Group
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import ModelSource
from haq_lab.prefix.contents import Prefix
from haq_lab.routing.trace import Trace
from haq_lab.storage.safetensors_file import read_shard, read_shard_header
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
        contiguous: Store the packed weights of the layers that `load_layers` yields in one block of memory, if the
            backend has such blocks. The memory of single weights can then not be freed.

    Raises:
        UserError: A file is missing, damaged or renamed. The message names the file and the tensor.
    """

    quantized = True

    def __init__(self, folder: Path, backend: Backend, contiguous: bool = False):
        self.manifest = Manifest.read(folder)
        self.backend = backend
        self._contiguous = contiguous
        self._block: AbstractContextManager[object] = nullcontext()
        with ThreadPoolExecutor(1) as reader:
            self._outer = reader.submit(read_shard, folder, self.manifest.shard(folder, REST))
            self.manifest.check_files(folder)
            super().__init__(folder, family=quantization_of(folder).get("family"))
        del self._outer
        if (stamp := quantization_of(folder).get("prefix")) is not None:
            self._use_prefix(Prefix.of_stamp(stamp, f"the prefix in {folder / 'config.json'}"))
        if has_int8_head(folder):
            self.quantize_head(backend)

    def read_outer_tensors(self) -> dict[str, Tensor]:
        return read_shard(self.folder, self.manifest.shard(self.folder, REST))[0]

    def _shell_tensors(self) -> dict[str, Tensor]:
        if self._contiguous:  # getting the memory takes as long as reading these tensors, which goes on meanwhile
            self._block = self.backend.weight_block(self._weights())
        tensors = self._outer.result()[0]
        for tensor in tensors.values():
            prefer_huge_pages(tensor)  # for the head, whose weights are read for each token
        return tensors

    def routing(self) -> Trace | None:
        """Return the routing trace of the calibration pass, or None if the checkpoint has none."""
        return Trace.open(self.folder / ROUTING) if ROUTING in self.manifest.files else None

    def load_layer(self, index: int) -> nn.Module:
        """Return decoder layer `index` in int8.

        Raises:
            UserError: The layer's file is damaged or does not fit the config.
        """
        return self._build_layer(index, self._read_layer(index))

    def load_layers(self) -> Iterator[nn.Module]:
        """Yield all decoder layers in int8. The file of the next layer is read while a layer is built.

        Raises:
            UserError: A layer's file is damaged or does not fit the config.
        """
        block, self._block = self._block, nullcontext()
        # Packing copies the weights, so the memory of a file can be used again when its layer is built.
        size = max(shard.bytes for shard in self.manifest.shards.values()) if self.backend.native else 0
        buffers = [torch.empty(size, dtype=torch.uint8) if size else None for _ in range(2)]
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read_layer, 0, buffers[0])
            for index in range(self.depth):
                stored = ahead.result()
                if index + 1 < self.depth:
                    ahead = reader.submit(self._read_layer, index + 1, buffers[(index + 1) % 2])
                with block:
                    layer = self._build_layer(index, stored)
                yield layer

    def weight_formats(self) -> list[dict[str, WeightFormat]]:
        """Return for each layer the format of the weights of each quantised linear, by its name within the layer.

        Raises:
            UserError: A file is missing or is not readable.
        """
        formats = []
        for index in range(self.depth):
            shard, prefix = self.manifest.shard(self.folder, layer_file(index)), f"{self.family.layers}.{index}."
            path = self.folder / shard.file
            if not path.is_file():
                raise UserError(f"checkpoint: {path} is missing. Copy the whole checkpoint folder.")
            header, _ = read_shard_header(path)
            metadata = header.get("__metadata__", {})
            narrow = read_formats(metadata, path)
            formats.append({name.removeprefix(prefix): narrow.get(name, INT8) for name in read_forms(metadata, path)})
        return formats

    def _weights(self) -> Iterator[tuple[int, int, WeightFormat]]:
        """Yield the shape (n, k) and the format of the quantised weights of all layers."""
        sizes: dict[tuple[Group, ...], dict[str, tuple[int, int]]] = {}  # layers of one kind are alike
        for index, formats in enumerate(self.weight_formats()):  # of unchecked files, but only sizes depend on it
            if (groups := self.groups_of(index)) not in sizes:
                layer = self.new_layer(index)
                linears: dict[str, Any] = {n: layer.get_submodule(n) for group in groups for n in group.consumers}
                sizes[groups] = {name: (each.out_features, each.in_features) for name, each in linears.items()}
            for name, size in sizes[groups].items():
                yield *size, formats.get(name, INT8)

    def _read_layer(self, index: int, buffer: Tensor | None = None) -> LayerContent:
        return read_layer(self.folder, self.manifest.shard(self.folder, layer_file(index)), buffer)

    def _build_layer(self, index: int, content: LayerContent) -> nn.Module:
        where, prefix = str(self.folder / layer_file(index)), f"{self.family.layers}.{index}."
        for name in content.tensors:
            if not name.startswith(prefix):
                raise UserError(
                    f"checkpoint: {where}: tensor '{name}' does not belong to layer {index}. "
                    "Write the checkpoint again."
                )
        content = content.renamed(lambda name: name.removeprefix(prefix))
        return int8_layer(self, index, content, self.backend, where)


def has_int8_head(folder: Path) -> bool:
    """Return whether `folder` is a quantised checkpoint with an int8 head (`quantizer.lm_head=true`).

    The file stores the head in float; loading quantises it.
    """
    return bool(quantization_of(folder).get("int8_head", False))


def quantization_of(folder: Path) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint folder, or nothing if its config has none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config", {})


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
    settings = {name: getattr(source, name) for name in ("allow_nonfinite", "family") if hasattr(source, name)}
    return LayeredModel(source.folder(), **settings)
