"""A checkpoint's tensors, by name, read from its safetensors files one decoder layer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from haq_lab.utils.errors import UserError


class Weights:
    """The tensors of a checkpoint folder. Opening it reads only the headers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in _shards(folder):
            with _open(path) as shard:
                self._file_of.update(dict.fromkeys(shard.keys(), path))

    def names(self) -> list[str]:
        """The tensors' names, sorted."""
        return sorted(self._file_of)

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Tensors by name, floating ones as `dtype` where one is given.

        Raises `UserError` for a tensor that is missing, unreadable, or has NaN or infinite entries.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._file_of:
                raise UserError(f"model: tensor '{name}' is missing from {self.folder}")
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors = {}
        for path, wanted in by_file.items():
            with _open(path) as shard:
                for name in wanted:
                    tensor = shard.get_tensor(name)
                    if tensor.is_floating_point():
                        if not torch.isfinite(tensor).all():
                            raise UserError(f"model: tensor '{name}' in {path} has NaN or infinite entries")
                        tensor = tensor.to(dtype or tensor.dtype)
                    tensors[name] = tensor
        return tensors


def _shards(folder: Path) -> list[Path]:
    """The files an index names, else all safetensors of the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise UserError(f"model: '{index}' is not a readable index ({error})") from error
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"model: {index} names '{name}', which lies outside the checkpoint")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"model: {index} names '{missing[0]}', which is not there")
        return [folder / name for name in names]
    return sorted(folder.glob("*.safetensors"))


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"model: '{path}' is not a readable safetensors file ({error})") from error
