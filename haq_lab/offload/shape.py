"""A Mixture-of-Experts model by its sizes: what costs, budgets and plans need to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Mixture-of-Experts model by its sizes.

    Attributes:
        layers: Decoder layers, all with experts.
        experts: In a layer.
        k: Experts that a token chooses.
        expert: Weights of one expert.
        rest: Weights of one layer outside the experts.
        outside: Weights outside the layers that a token reads: the head. The embedding has as many.
        kv_per_token: Numbers in the key-value cache, all layers.
    """

    layers: int
    experts: int
    k: int
    expert: int
    rest: int
    outside: int
    kv_per_token: int

    @classmethod
    def of(cls, config: Any, experts: int) -> Shape:
        """From a transformers config."""
        hidden, layers = config.hidden_size, config.num_hidden_layers
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        keys = config.num_key_value_heads * head
        queries = config.num_attention_heads * head
        return cls(
            layers=layers,
            experts=experts,
            k=config.num_experts_per_tok,
            expert=3 * hidden * inner,
            rest=2 * hidden * queries + 2 * hidden * keys + hidden * experts,
            outside=hidden * config.vocab_size,
            kv_per_token=2 * keys * layers,
        )


MIXTRAL = Shape(32, 8, 2, 3 * 4096 * 14336, 2 * 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 8, 4096 * 32000, 65536)  # 8x7B
