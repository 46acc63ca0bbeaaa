"""The largest magnitude of every channel before and after smoothing: where the outliers were, and where they went."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from haq_lab.utils.atomic_files import atomic_file

FILE = "ranges.safetensors"


@dataclass
class Ranges:
    """Of the inputs that every token has; those within experts are left out, as they would be most of the file.

    Attributes:
        before, after: By site (`haq_lab.models.architectures.Group.site`), a (k,) largest |x| for each layer so far,
            as the model was and as smoothed.
    """

    before: dict[str, list[Tensor]] = field(default_factory=dict)
    after: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def smoothed(self) -> list[str]:
        """The sites that smoothing has changed in any layer."""
        pairs = {site: zip(rows, self.after[site], strict=True) for site, rows in self.before.items()}
        return [site for site, layers in pairs.items() if not all(torch.equal(*pair) for pair in layers)]

    def add(self, site: str, before: Tensor, after: Tensor) -> None:
        """The next layer's maxima at a site, (k,) both."""
        self.before.setdefault(site, []).append(before.clone())
        self.after.setdefault(site, []).append(after.clone())

    def tensors(self) -> dict[str, Tensor]:
        """`<site>.before` and `<site>.after`, (layers, k) float32 each."""
        pairs = (("before", self.before), ("after", self.after))
        return {f"{site}.{state}": torch.stack(rows) for state, sites in pairs for site, rows in sites.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Ranges:
        """The inverse of `tensors`."""
        ranges = cls()
        for name, rows in tensors.items():
            site, _, state = name.rpartition(".")
            (ranges.before if state == "before" else ranges.after)[site] = list(rows)
        return ranges

    def save(self, path: Path) -> None:
        """Write them, aside first."""
        with atomic_file(path) as aside:
            save_file(self.tensors(), aside)

    @classmethod
    def open(cls, path: Path) -> Ranges:
        """What `save` wrote."""
        return cls.of(load_file(path))
