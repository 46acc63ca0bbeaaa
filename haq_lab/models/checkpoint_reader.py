"""Read a checkpoint's tensors by name from its safetensors files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from haq_lab.storage.weight_files import weight_files
from haq_lab.utils.errors import UserError

# Bytes up to which a tensor is copied. Norms, biases and routers stay when the matrices are quantised. A view of the
# file would keep the pages of all tensors that were read with it in memory.
SMALL = 4 << 20
WIDE = (torch.float16, torch.bfloat16, torch.float32)  # types that are not converted


class Weights:
    """The tensors of a checkpoint folder. Opening it reads only the headers.

    Args:
        folder: The checkpoint folder.
        allow_nonfinite: Accept tensors with NaN or infinite entries.

    Attributes:
        unread: Weight files of the folder that are not read. transformers does not read them either.

    Raises:
        UserError: The folder has no weights, or a file cannot be read.
    """

    def __init__(self, folder: Path, allow_nonfinite: bool = False):
        self.folder = folder
        self._allow_nonfinite = allow_nonfinite
        files = weight_files(folder)
        self.unread = files.unread
        self._file_of: dict[str, Path] = {}
        for path in files.read:
            with _open(path) as shard:
                self._file_of.update(dict.fromkeys(shard.keys(), path))

    def names(self) -> list[str]:
        """Return the tensors' names, sorted."""
        return sorted(self._file_of)

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Return tensors by name.

        Args:
            dtype: Type of the floating-point tensors that are returned. If None, 16 and 32 bits stay as stored.
                Float8 and float64 become float32, as in transformers.

        Raises:
            UserError: A tensor is missing, cannot be read, is quantised, or has NaN or infinite entries.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._file_of:
                raise UserError(f"model: tensor '{name}' is missing from {self.folder}. Download the checkpoint again.")
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors = {}
        for path, wanted in by_file.items():
            with _open(path) as shard:
                for name in wanted:
                    tensors[name] = self._floating(shard.get_tensor(name), dtype, name, path)
        return tensors

    def _floating(self, tensor: torch.Tensor, dtype: torch.dtype | None, name: str, path: Path) -> torch.Tensor:
        if name.endswith(".weight") and tensor.dtype in (torch.int8, torch.uint8):
            raise UserError(
                f"model: tensor '{name}' in {path} has type {str(tensor.dtype).removeprefix('torch.')}. "
                "Quantised weights without a quantization_config cannot be read. "
                "Use a checkpoint with floating-point weights."
            )
        if not tensor.is_floating_point():
            return tensor
        if tensor.dtype not in WIDE:
            tensor = tensor.to(torch.float32)
        if not self._allow_nonfinite and not torch.isfinite(tensor).all():
            raise UserError(
                f"model: tensor '{name}' in {path} has NaN or infinite entries. Use a checkpoint with finite weights, "
                "or set model.allow_nonfinite=true."
            )
        tensor = tensor.to(dtype or tensor.dtype)
        return tensor.clone() if tensor.nbytes <= SMALL else tensor


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"model: '{path}' is not a readable safetensors file ({error}). Download it again.") from error
