"""The tokens of a prefix with their keys and values, and the file that stores them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from haq_lab.storage.json_form import parse_json
from haq_lab.storage.safetensors_file import describe_shard, read_shard, write_shard
from haq_lab.utils.errors import UserError

FILE = "prefix.safetensors"


class _About(TypedDict):
    tokens: list[int]
    text: str


_ABOUT = TypeAdapter(_About)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix, computed in full precision.

    Attributes:
        tokens: Token ids.
        text: The tokens as text.
        keys: Keys of all layers, float32 (layers, key-value heads, p, head_dim). Rotated to the positions -p to -1.
        values: Values of all layers, float32 (layers, key-value heads, p, head_dim).
    """

    tokens: tuple[int, ...]
    text: str
    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def stamp(self) -> dict[str, Any]:
        """Return the tokens and their text, for JSON."""
        return {"tokens": list(self.tokens), "text": self.text}

    def save(self, path: Path) -> None:
        """Write the prefix to a file atomically. The same prefix always gives the same bytes."""
        write_shard(path, {"keys": self.keys, "values": self.values}, {"prefix": json.dumps(self.stamp())})

    @classmethod
    def open(cls, path: Path, shape: tuple[int, int, int]) -> Prefix:
        """Read a prefix.

        Args:
            path: A file that `save` has written.
            shape: The model's layers, key-value heads and width of a head.

        Raises:
            UserError: The file is damaged, or belongs to another model.
        """
        tensors, metadata = read_shard(path.parent, describe_shard(path))
        try:
            about = parse_json(metadata.get("prefix", ""), _ABOUT)
        except ValueError as error:
            raise UserError(f"checkpoint: {path} does not name its tokens ({error}). Write it again.") from error
        layers, heads, width = shape
        expected = (layers, heads, len(about["tokens"]), width)
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dict.fromkeys(
            ("keys", "values"), expected
        ):
            raise UserError(f"checkpoint: {path} does not fit the config. Write the checkpoint again.")
        return cls(tuple(about["tokens"]), about["text"], tensors["keys"], tensors["values"])
