"""From a memory budget to expert slots. Key-value cache, workspace and spare slots are served first."""

from __future__ import annotations

from dataclasses import dataclass

from haq_lab.utils.errors import UserError, nearest
from haq_lab.utils.units import UNITS, parse_quantity

FORMS = "a share as '40%', bytes as '500MB' or '6GiB', or a number of experts"


@dataclass(frozen=True)
class Budget:
    """What the user gave: one of the three.

    Attributes:
        share: Of all experts' bytes; 1 makes all resident, the spare slots beside them.
        bytes: Of the fast tier for experts, key-value cache and workspace.
        experts: Resident ones, all layers together.
    """

    share: float | None = None
    bytes: int | None = None
    experts: int | None = None

    @classmethod
    def parse(cls, text: str | int) -> Budget:
        """From the setting. Raises `UserError` for what is none of the forms."""
        found = parse_quantity(text)
        if found is None or found[1] not in ("", "%", *UNITS):
            hint = nearest(found[1], UNITS) if found else ""
            raise UserError(f"offload.budget: '{text}' is not {FORMS}{hint}")
        number, unit = found
        if number == 0:
            raise UserError(f"offload.budget: '{text}' leaves no slot for an expert; give it {FORMS}, or offload=none")
        if unit == "%":
            if number > 100:
                raise UserError(f"offload.budget: '{text}' is more than all experts")
            return cls(share=number / 100)
        if unit:
            return cls(bytes=int(number * UNITS[unit]))
        if number != int(number):
            raise UserError(f"offload.budget: '{text}' is not {FORMS}")
        return cls(experts=int(number))

    def slots(self, total: int, blob_bytes: int, spare: int, reserved: int = 0) -> int:
        """Expert slots beside the spare ones.

        Args:
            total: Experts of the model.
            blob_bytes: Of one expert in the fast tier.
            spare: Slots for experts that pass through; they come out of a budget in bytes or as a share.
            reserved: Bytes of key-value cache and workspace; they come out of a budget in bytes.

        Raises:
            UserError: Nothing is left for a single expert.
        """
        if self.share == 1:
            return total
        if self.share is not None:
            slots, took = int(self.share * total) - spare, f"{spare} spare slots"
        elif self.bytes is not None:
            slots = (self.bytes - reserved) // blob_bytes - spare
            took = f"{reserved:,} bytes of key-value cache and workspace, and {spare} spare slots,"
        else:
            slots, took = self.experts or 0, "no spare slots"
        if slots < 1:
            raise UserError(
                f"offload.budget: it leaves no slot for an expert of {blob_bytes:,} bytes ({took} come first); "
                "give it more, or offload=none"
            )
        return min(slots, total)
