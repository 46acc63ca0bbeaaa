"""Describe the experts of a model with offloading, for the page `/experts`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from haq_lab.offload.session import OffloadSession

PAGE = Path(__file__).with_name("experts.html")


def expert_view(offload: OffloadSession) -> dict[str, Any]:
    """Return what `/experts.json` shows: the totals, and for each expert whether it is resident and its counts.

    Args:
        offload: The model's offloading session. Its model may run in another thread.

    Returns:
        `stats` as `OffloadSession.stats` returns it, `layers` (the indices of the layers with experts), and
        `resident`, `hits`, `misses` and `bytes_moved` as lists of these layers, with one value for each expert.
    """
    experts = {"resident": offload.residents().astype(int)} | offload.expert_stats()
    about = {"stats": offload.stats(), "layers": offload.model.kinds.moe_layers}
    return about | {name: values.tolist() for name, values in experts.items()}
