"""The tokens of a prefix, with the keys and values that the full-precision model computes for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from haq_lab.storage.json_form import check_form
from haq_lab.utils.errors import UserError


class _Stamp(TypedDict):
    tokens: list[int]
    text: str


_STAMP = TypeAdapter(_Stamp)


@dataclass(frozen=True, eq=False)
class States:
    """Keys and values of a prefix, in full precision.

    Attributes:
        keys: Float32 (layers, key-value heads, p, head_dim). Rotated to the positions -p to -1.
        values: Float32 (layers, key-value heads, p, head_dim).
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix.

    Attributes:
        tokens: Token ids.
        text: The tokens as text.
        states: Its keys and values. None in a quantised checkpoint, whose layers have them: smoothing may have scaled
            the values.
    """

    tokens: tuple[int, ...]
    text: str
    states: States | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def stamp(self) -> dict[str, Any]:
        """Return the tokens and their text, for JSON."""
        return {"tokens": list(self.tokens), "text": self.text}

    @classmethod
    def of_stamp(cls, stamp: Any, where: str) -> Prefix:
        """Return the prefix that a checkpoint names.

        Args:
            stamp: What `stamp` has returned.
            where: Where it was found, for the error message.

        Raises:
            UserError: It has another form.
        """
        try:
            form = check_form(stamp, _STAMP)
        except ValueError as error:
            raise UserError(f"checkpoint: {where} is not readable ({error}). Write the checkpoint again.") from error
        return cls(tuple(form["tokens"]), form["text"])
