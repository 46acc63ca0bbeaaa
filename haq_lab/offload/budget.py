"""Convert a memory budget into expert slots. KV cache, workspace and spare slots are subtracted first."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haq_lab.utils.errors import UserError, nearest
from haq_lab.utils.units import UNITS, parse_quantity

FORMS = "a share as '40%', bytes as '500MB' or '6GiB', or a number of experts"


@dataclass(frozen=True)
class Budget:
    """The size of the fast tier, in one of three forms.

    Attributes:
        share: Share of all experts' bytes, 0 to 1. With 1, all experts are resident and the spare slots are added.
        bytes: Bytes of the fast tier for experts, KV cache and workspace.
        experts: Number of resident experts of all layers together.
    """

    share: float | None = None
    bytes: int | None = None
    experts: int | None = None

    @classmethod
    def parse(cls, text: str | int) -> Budget:
        """Parse the setting `offload.budget`.

        Args:
            text: A share such as "40%", bytes such as "500MB", or a number of experts.

        Raises:
            UserError: The text has none of these forms, or the budget holds no expert.
        """
        quantity = parse_quantity(text)
        if quantity is None or quantity[1] not in ("", "%", *UNITS):
            hint = nearest(quantity[1], UNITS) if quantity else ""
            raise UserError(f"offload.budget: '{text}' is not {FORMS}{hint or '.'}")
        number, unit = quantity
        if number == 0:
            raise UserError(
                f"offload.budget: '{text}' leaves no slot for an expert. Give {FORMS}, or choose offload=none."
            )
        if unit == "%":
            if number > 100:
                raise UserError(f"offload.budget: '{text}' is more than all experts. Give at most 100%.")
            return cls(share=number / 100)
        if unit:
            return cls(bytes=int(number * UNITS[unit]))
        if number != int(number):
            raise UserError(f"offload.budget: '{text}' is not {FORMS}.")
        return cls(experts=int(number))

    def slots(
        self, sizes: NDArray[np.int64], resident_bytes: Callable[[int], int], spare_bytes: int, reserved: int = 0
    ) -> int:
        """Return the number of resident experts.

        Args:
            sizes: Bytes of each expert of the model in the fast tier.
            resident_bytes: Returns the bytes that the placement's first n experts take, for n from 1.
            spare_bytes: Bytes of the spare slots. They are subtracted from a budget in bytes or as a share.
            reserved: Bytes of KV cache and workspace. They are subtracted from a budget in bytes.

        Raises:
            UserError: The budget leaves no slot for an expert.

        Example:
            >>> Budget(bytes=5000).slots(np.full((2, 8), 1000), lambda count: 1000 * count, spare_bytes=2000)
            3
        """
        if self.share == 1:
            return sizes.size
        if self.experts is not None:
            return min(self.experts, sizes.size)
        took = f"{spare_bytes:,} bytes of spare slots"
        if self.share is not None:
            room = round(self.share * int(sizes.sum())) - spare_bytes
        else:
            assert self.bytes is not None
            room, took = (
                self.bytes - reserved - spare_bytes,
                f"{reserved:,} bytes of KV cache and workspace, and {took},",
            )
        slots = bisect_right(range(1, sizes.size + 1), room, key=resident_bytes)
        if slots < 1:
            raise UserError(
                f"offload.budget: it leaves no slot for an expert of {sizes.min():,} bytes ({took} come first). "
                "Raise it, or choose offload=none."
            )
        return slots
