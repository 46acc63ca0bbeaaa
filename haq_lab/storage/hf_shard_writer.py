"""Write a Hugging Face checkpoint one shard at a time, so that only one shard is in memory."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from haq_lab.utils.atomic_files import write_json


class ShardWriter:
    """Writes `model-00001-of-000NN.safetensors` and so on, and then their index.

    Args:
        folder: Existing folder to write to.
        count: Number of shards that will be written.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self._file_of: dict[str, str] = {}
        self._bytes = 0
        self._written = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write the next shard. Tensors that share memory are stored in full.

        Args:
            tensors: Tensors of the shard by name.
        """
        self._written += 1
        name = f"model-{self._written:05}-of-{self.count:05}.safetensors"
        copies = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        save_file(copies, self.folder / name, metadata={"format": "pt"})
        self._file_of.update(dict.fromkeys(copies, name))
        self._bytes += sum(tensor.nbytes for tensor in copies.values())

    def finish(self) -> None:
        """Write `model.safetensors.index.json`. All shards must have been added."""
        assert self._written == self.count, f"{self._written} of {self.count} shards are written"
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._file_of.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)
