"""Record the largest magnitude of every input channel before and after smoothing, to show where outliers are."""

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
    """The input ranges of all layers. Inputs inside experts are left out, because they would be most of the file.

    Attributes:
        before: For each site (`haq_lab.models.families.family.Group.site`), the largest |x| (k,) of every layer so far,
            before smoothing.
        after: The same after smoothing.
    """

    before: dict[str, list[Tensor]] = field(default_factory=dict)
    after: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def smoothed(self) -> list[str]:
        """The sites that smoothing has changed in at least one layer."""
        pairs = {site: zip(rows, self.after[site], strict=True) for site, rows in self.before.items()}
        return [site for site, layers in pairs.items() if not all(torch.equal(*pair) for pair in layers)]

    def add(self, site: str, before: Tensor, after: Tensor) -> None:
        """Add the maxima (k,) of the next layer at a site, before and after smoothing.

        Layers with another k than the site's first layer, as Gemma 4 has, are kept under a name of their own.
        """
        if site in self.before and len(self.before[site][0]) != len(before):
            site = f"{site} ({len(before)} channels)"
        self.before.setdefault(site, []).append(before.clone())
        self.after.setdefault(site, []).append(after.clone())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors `<site>.before` and `<site>.after`, each (layers, k) float32."""
        pairs = (("before", self.before), ("after", self.after))
        return {f"{site}.{state}": torch.stack(rows) for state, sites in pairs for site, rows in sites.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Ranges:
        """Build the ranges from the result of `tensors`."""
        ranges = cls()
        for name, rows in tensors.items():
            site, _, state = name.rpartition(".")
            (ranges.before if state == "before" else ranges.after)[site] = list(rows)
        return ranges

    def save(self, path: Path) -> None:
        """Write the ranges to a safetensors file, atomically."""
        with atomic_file(path) as temporary:
            save_file(self.tensors(), temporary)

    @classmethod
    def open(cls, path: Path) -> Ranges:
        """Read the ranges from a file that `save` wrote."""
        return cls.of(load_file(path))
