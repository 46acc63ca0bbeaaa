"""Count hits, misses, bytes moved and prefetches of an engine, per layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Counters:
    """Counts per layer what an engine does.

    Args:
        layers: Number of layers of the model.
        blob_bytes: Bytes that are moved for one expert.

    Attributes:
        tokens: Tokens that have entered the first layer, of prompts and decoded.
        read: (layers,) experts fetched, prefetched ones included.
        guessed: (layers,) experts prefetched.
        guesses_used: (layers,) prefetched experts that were then needed.
        waited: (layers,) seconds that computing waited for experts.
    """

    def __init__(self, layers: int, blob_bytes: int):
        self._blob_bytes, self.tokens = blob_bytes, 0
        self._pairs, self._pair_hits, self._experts, self._expert_hits = np.zeros((4, layers), np.int64)
        self.read, self.guessed, self.guesses_used = np.zeros((3, layers), np.int64)
        self.waited = np.zeros(layers)

    def visit(self, layer: int, tokens: int, counts: NDArray[np.int64], missing: list[int]) -> None:
        """Count the hits and misses of one layer in one step.

        Args:
            layer: Index of the layer.
            tokens: Number of tokens in the step.
            counts: (E,) tokens per expert.
            missing: Experts that are needed and not resident.
        """
        if layer == 0:
            self.tokens += tokens
        self._pairs[layer] += counts.sum()
        self._pair_hits[layer] += counts.sum() - counts[missing].sum()
        self._experts[layer] += np.count_nonzero(counts)
        self._expert_hits[layer] += np.count_nonzero(counts) - len(missing)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their full names.

        Hit rates and values per token are left out if nothing was counted.
        """
        moved, waited = float(self.read.sum() * self._blob_bytes), float(self.waited.sum())
        metrics = {}
        if self._pairs.any():
            metrics["offload.hit_rate_pairs"] = float(self._pair_hits.sum() / self._pairs.sum())
            metrics["offload.hit_rate_experts"] = float(self._expert_hits.sum() / self._experts.sum())
            metrics["offload.hit_rate_layer_std"] = float((self._pair_hits / np.maximum(self._pairs, 1)).std())
        if self.tokens:
            metrics["offload.bytes_moved_per_token"] = moved / self.tokens
            metrics["offload.waited_ms_per_token"] = 1e3 * waited / self.tokens
        return metrics | {
            "offload.tokens": float(self.tokens),
            "offload.bytes_moved": moved,
            "offload.waited_s": waited,
        }

    def prefetch_accuracy(self) -> float:
        """Return the share of prefetched experts that were needed."""
        return float(self.guesses_used.sum() / max(self.guessed.sum(), 1))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per layer, as a dict."""
        return [
            {
                "hits": int(self._pair_hits[layer]),
                "misses": int(self._pairs[layer] - self._pair_hits[layer]),
                "bytes": int(self.read[layer] * self._blob_bytes),
                "waited_s": float(self.waited[layer]),
                "guessed": int(self.guessed[layer]),
                "guesses_used": int(self.guesses_used[layer]),
            }
            for layer in range(len(self.read))
        ]
