"""Count hits, misses, bytes moved and prefetches of an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Counters:
    """Counts what an engine does.

    Args:
        moved_bytes: (layers, E) bytes that are moved to fetch each expert.

    Attributes:
        tokens: Tokens that have entered the first layer, of prompts and decoded.
        hits: (layers, E) choices of an expert by a token while the expert was in the fast tier.
        misses: (layers, E) choices of an expert by a token while it was not.
        read: (layers, E) times that an expert was fetched, prefetches included.
        guessed: (layers,) experts prefetched.
        guesses_used: (layers,) prefetched experts that were then needed.
        waited: (layers,) seconds that computing waited for experts.
    """

    def __init__(self, moved_bytes: NDArray[np.int64]):
        layers, experts = moved_bytes.shape
        self._moved_bytes, self.tokens = moved_bytes, 0
        self.hits, self.misses, self.read = np.zeros((3, layers, experts), np.int64)
        self._experts, self._expert_hits, self.guessed, self.guesses_used = np.zeros((4, layers), np.int64)
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
        self.hits[layer] += counts
        self.hits[layer, missing] -= counts[missing]
        self.misses[layer, missing] += counts[missing]
        self._experts[layer] += np.count_nonzero(counts)
        self._expert_hits[layer] += np.count_nonzero(counts) - len(missing)

    @property
    def bytes_moved(self) -> NDArray[np.int64]:
        """(layers, E) bytes that were fetched for each expert."""
        return self.read * self._moved_bytes

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their full names.

        Hit rates and values per token are left out if nothing was counted.
        """
        moved, waited = float(self.bytes_moved.sum()), float(self.waited.sum())
        hits, pairs = self.hits.sum(1), (self.hits + self.misses).sum(1)  # each (layers,)
        metrics = {}
        if pairs.any():
            metrics["offload.hit_rate_pairs"] = float(hits.sum() / pairs.sum())
            metrics["offload.hit_rate_experts"] = float(self._expert_hits.sum() / self._experts.sum())
            metrics["offload.hit_rate_layer_std"] = float((hits / np.maximum(pairs, 1)).std())
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
                "hits": int(self.hits[layer].sum()),
                "misses": int(self.misses[layer].sum()),
                "bytes": int(self.bytes_moved[layer].sum()),
                "waited_s": float(self.waited[layer]),
                "guessed": int(self.guessed[layer]),
                "guesses_used": int(self.guesses_used[layer]),
            }
            for layer in range(len(self.read))
        ]
