"""Read a checkpoint's tensors by name from its safetensors files. Float8 and MXFP4 weights become wider floats."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from haq_lab.storage.narrow_floats import stored_parts, widen_float8, widen_mxfp4
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
        self._parts = stored_parts(self._file_of)
        self._block = _block_of(folder)

    def names(self) -> list[str]:
        """Return the tensors' names, sorted. Weights in float8 and MXFP4 have one name."""
        return sorted(self._parts)

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Return tensors by name.

        Args:
            dtype: Type of the floating-point tensors that are returned. If None, 16 and 32 bits stay as stored.
                Float8, MXFP4 and float64 become float32, as in transformers.

        Raises:
            UserError: A tensor is missing, cannot be read, is quantised, or has NaN or infinite entries.
        """
        tensors = {}
        with ExitStack() as stack:
            shards: dict[Path, safe_open] = {}
            for name in names:
                if name not in self._parts:
                    raise UserError(
                        f"model: tensor '{name}' is missing from {self.folder}. Download the checkpoint again."
                    )
                loaded = []
                for part in self._parts[name]:
                    path = self._file_of[part]
                    if path not in shards:
                        shards[path] = stack.enter_context(_open(path))
                    loaded.append(shards[path].get_tensor(part))
                tensors[name] = self._floating(loaded, dtype, name, self._file_of[self._parts[name][0]])
        return tensors

    def _floating(self, stored: list[torch.Tensor], dtype: torch.dtype | None, name: str, path: Path) -> torch.Tensor:
        """Return a tensor in a wide type, given what stores it: the tensor, or its levels and scales."""
        tensor = stored[0]
        packed = tensor.dtype == torch.uint8 and len(stored) > 1 and tensor.dim() > 3
        if name.endswith(".weight") and tensor.dtype in (torch.int8, torch.uint8) and not packed:
            raise UserError(
                f"model: tensor '{name}' in {path} has type {str(tensor.dtype).removeprefix('torch.')}. "
                "Quantised weights without a quantization_config cannot be read. "
                "Use a checkpoint with floating-point weights."
            )
        if len(stored) > 1:
            try:
                wide = dtype or torch.float32
                levels, scales = stored
                widen = widen_mxfp4 if packed else partial(widen_float8, block=self._block)
                tensor = widen(levels, scales, wide)
            except ValueError as error:
                raise UserError(f"model: tensor '{name}' in {path} is damaged: {error}. Download it again.") from error
        if not tensor.is_floating_point():
            return tensor
        if tensor.dtype not in WIDE:
            tensor = tensor.to(torch.float32)
        if not self._allow_nonfinite and not _all_finite(tensor):
            raise UserError(
                f"model: tensor '{name}' in {path} has NaN or infinite entries. Use a checkpoint with finite weights, "
                "or set model.allow_nonfinite=true."
            )
        return tensor.to(dtype or tensor.dtype, copy=tensor.nbytes <= SMALL)


def _all_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinite entry. A finite sum proves it in a fifth of the time."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _block_of(folder: Path) -> tuple[int, int] | None:
    """Return the rows and columns of a block of float8 weights that share a scale, if config.json states them."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows, columns = config["quantization_config"]["weight_block_size"]
        return int(rows), int(columns)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"model: '{path}' is not a readable safetensors file ({error}). Download it again.") from error
