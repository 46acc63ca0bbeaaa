"""Write an ordinary Hugging Face checkpoint a shard at a time, so that no more than one shard is in memory."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from haq_lab.utils.atomic_files import write_json


class ShardWriter:
    """Writes `model-00001-of-000NN.safetensors` and so on, then their index.

    Args:
        folder: Where; it exists.
        count: How many shards there will be.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self._file_of: dict[str, str] = {}
        self._bytes = 0
        self._written = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write the next shard. A tensor that shares its storage with another is stored in full."""
        self._written += 1
        name = f"model-{self._written:05}-of-{self.count:05}.safetensors"
        own = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        save_file(own, self.folder / name, metadata={"format": "pt"})
        self._file_of.update(dict.fromkeys(own, name))
        self._bytes += sum(tensor.nbytes for tensor in own.values())

    def finish(self) -> None:
        """Write `model.safetensors.index.json`; every shard must have been added."""
        assert self._written == self.count, f"{self._written} shards of {self.count}"
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._file_of.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)
